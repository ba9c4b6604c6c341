from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from tests.export.parts import TEXTS, export, features, random_images
from tests.models.tiny import ODD, RESNET, bert_config, clip_bundle
from twotower.export.tokenizers import openai_tokenizer
from twotower.models.dual_encoder import MODELS
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.settings import ConfigError


def test_transformers_opens_the_folder_with_equal_features(tmp_path: Path) -> None:
    bundle = clip_bundle(ODD, quick_gelu=False, std=(0.5, 0.4, 0.3))
    told = export(bundle, "hf", tmp_path / "out")
    assert f"CLIPModel.from_pretrained('{tmp_path / 'out'}')" in told
    model = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    images = random_images(bundle)
    inputs = processor(
        text=TEXTS, images=list(images), padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**inputs)
    for found, expected in zip(
        (output.image_embeds, output.text_embeds), features(bundle, images), strict=True
    ):
        expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / "out")))
    assert again.assets == bundle.assets


@pytest.mark.parametrize("context_length", [9, 77])
def test_the_tokenizer_gives_openais_ids(context_length: int, tmp_path: Path) -> None:
    texts = [*TEXTS, "  It's   a Café, über 30% of naïve façades; 浜辺を走る犬 🐕", "x" * 300]
    made = openai_tokenizer(context_length)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        found = tokenizer(texts, truncation=True)["input_ids"]
        expected = OpenAITokenizer(context_length)(texts)
        for ids, row in zip(found, expected.tolist(), strict=True):
            assert ids == row[: len(ids)] and not any(row[len(ids) :])


def test_what_clip_model_does_not_have_is_refused(bert: Path, tmp_path: Path) -> None:
    for bundle, sentence in (
        (clip_bundle(RESNET), "CLIPModel has vision transformers only, and this image tower is a"),
        (MODELS.build(bert_config(bert)), "of bert_resnet is none of OpenAI's"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            export(bundle, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
