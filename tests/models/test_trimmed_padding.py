"""Captions without the padding of their batch have the features that they have with it."""

from dataclasses import replace
from pathlib import Path

import torch

from tests.models.tiny import VIT, bert_config, clip_bundle
from twotower.data.pairs import trim_padding
from twotower.models.dual_encoder import MODELS, ModelBundle

TEXTS = ["a dog on the beach", "", "two cats", "12 red cars in a row"]


def assert_same_features(bundle: ModelBundle) -> None:
    model = bundle.model.double().train()
    tokens = bundle.tokenizer(TEXTS)
    trimmed = trim_padding(tokens, bundle.tokenizer.pad_id)
    assert trimmed.shape[1] < tokens.shape[1]
    torch.manual_seed(0)
    whole = model.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(trimmed), whole, rtol=1e-10, atol=1e-10)


def test_openai_text_towers() -> None:
    assert_same_features(clip_bundle(replace(VIT, context_length=24)))


def test_hugging_face_text_towers(bert: Path) -> None:
    config = bert_config(bert)
    config.text_length = 24
    bundle = MODELS.build(config)
    bundle.model.text_tower.apply(
        lambda part: setattr(part, "p", 0.0) if isinstance(part, torch.nn.Dropout) else None
    )
    assert_same_features(bundle)
