"""A bundle's tokenizer as the file that others read."""

from __future__ import annotations

from typing import Any

from twotower.models.dual_encoder import Tokenizer
from twotower.models.huggingface_text import HuggingFaceTokenizer
from twotower.models.openai_tokenizer import byte_pairs

START, END = "<|startoftext|>", "<|endoftext|>"


def openai_tokenizer(context_length: int) -> Any:
    """OpenAI's byte pairs as a tokenizer of transformers, which cuts at `context_length`."""
    from transformers import CLIPTokenizer

    pairs = byte_pairs()
    special = {pairs.sot_token_id: START, pairs.eot_token_id: END}
    vocabulary = {special.get(number, token): number for token, number in pairs.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=sorted(pairs.bpe_ranks, key=pairs.bpe_ranks.__getitem__),
        model_max_length=context_length,
    )


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A `tokenizer.json` that gives the same ids, cut and padded alike."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.to_json()
    length = tokenizer.context_length
    made = openai_tokenizer(length).backend_tokenizer
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=0, pad_token=made.id_to_token(0))
    text: str = made.to_str()
    return text
