"""OpenAI's byte pairs as a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpenAITokenizer:
    """Captions -> ids (N, context_length) by OpenAI's byte pairs: start, text, end, zeros."""

    context_length: int = 77
    pad_id: ClassVar[int] = 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = self._encode(text)
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def _encode(self, text: str) -> list[int]:
        bpe = byte_pairs()
        room = self.context_length - 2
        # A token covers a limited number of characters, so what lies further back cannot be seen;
        # without this cut, a word of 10,000 letters takes minutes.
        text = bpe.clean_fn(text)[: (room + 1) * _longest_token()]
        ids: list[int] = []
        for word in bpe.pat.findall(text):
            if len(ids) >= room:
                break
            symbols = "".join(bpe.byte_encoder[byte] for byte in word.encode("utf-8"))
            ids += [bpe.encoder[token] for token in bpe.bpe(symbols).split(" ")]
        return [bpe.sot_token_id, *ids[:room], bpe.eot_token_id]


@lru_cache(maxsize=1)
def byte_pairs() -> Any:
    """OpenAI's vocabulary and merges, as open_clip ships them."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _longest_token() -> int:
    return max(len(token) for token in byte_pairs().encoder) + 1  # and a space after it
