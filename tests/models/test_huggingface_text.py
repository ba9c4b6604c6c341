"""Folders that bring code of their own: it is never run, whatever their files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower.models.huggingface_text import Pooling, load_text, rebuild_text
from twotower.settings import ConfigError

PLANTED = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertConfig as PlantedConfig, BertModel as PlantedModel
from transformers import BertTokenizerFast as PlantedTokenizer
"""


def plant(bert: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an encoder whose files ask for code that leaves a mark; returns the mark."""
    shutil.copytree(bert, folder)
    mark = folder / "ran"
    (folder / "planted.py").write_text(PLANTED.format(mark=str(mark)))
    asked = {
        "config.json": {
            "AutoConfig": "planted.PlantedConfig",
            "AutoModel": "planted.PlantedModel",
        },
        "tokenizer_config.json": {"AutoTokenizer": [None, "planted.PlantedTokenizer"]},
    }
    for name, auto_map in asked.items():
        content = json.loads((folder / name).read_text())
        added = changes if name == "config.json" else {}
        (folder / name).write_text(json.dumps({**content, "auto_map": auto_map, **added}))
    return mark


@pytest.fixture(autouse=True)
def somebody_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_code_beside_a_known_encoder_is_not_run(bert: Path, tmp_path: Path) -> None:
    mark = plant(bert, tmp_path / "planted")
    loaded, tokenizer, assets = load_text(str(tmp_path / "planted"), Pooling.mean, 8)
    rebuilt, _ = rebuild_text(assets, Pooling.mean, 8)
    rebuilt.load_state_dict(loaded.state_dict())
    honest, _, _ = load_text(str(bert), Pooling.mean, 8)
    tokens = tokenizer(["a dog on the beach"])
    with torch.no_grad():
        expected = honest.eval()(tokens)
        assert torch.equal(loaded.eval()(tokens), expected)
        assert torch.equal(rebuilt.eval()(tokens), expected)
    assert not mark.exists()


def test_an_encoder_that_only_its_own_code_knows_gets_a_sentence(
    bert: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "planted"
    mark = plant(bert, folder, model_type="planted")
    with pytest.raises(ConfigError) as error:
        load_text(str(folder), Pooling.mean, 8)
    assert str(error.value) == (
        f"model.text_encoder={folder} brings code of its own (auto_map), which twotower "
        "never runs; choose an encoder that transformers knows"
    )
    assert not mark.exists()
