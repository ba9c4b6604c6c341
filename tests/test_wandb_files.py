"""`wandb:...` in place of a path: what is fetched, kept, chosen and refused, without a server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from tests.helpers import write_pictures
from twotower import wandb_files
from twotower.config import Config
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.hydra_app import compose
from twotower.runs import checkpoint_path, logs_path, store_path
from twotower.settings import ConfigError
from twotower.wandb_files import CHECKPOINTS, local_file, parse_reference


class Artifact:
    """Behaves as wandb's: a version, and files that `download` writes."""

    def __init__(self, version: str, files: dict[str, bytes]) -> None:
        self.version, self.files, self.downloads = version, files, 0

    def download(self, root: str) -> str:
        self.downloads += 1
        for name, content in self.files.items():
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root


class Server:
    """Artifacts by name, and the names that were asked for."""

    def __init__(self) -> None:
        self.artifacts: dict[str, Artifact] = {}
        self.asked: list[str] = []

    def find(self, name: str) -> Artifact:
        self.asked.append(name)
        if name not in self.artifacts:
            raise ValueError(f"artifact '{name}' not found\nin two lines")
        return self.artifacts[name]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    wandb_files._kept.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wandb_files, "find_artifact", server.find)
    return server


def test_an_ordinary_path_asks_nobody(server: Server) -> None:
    assert local_file("models/a/best.safetensors", CHECKPOINTS) == Path("models/a/best.safetensors")
    assert server.asked == []


def test_a_version_is_downloaded_once_and_an_alias_is_asked_for_again(server: Server) -> None:
    first = Artifact("v0", {"best.safetensors": b"first"})
    second = Artifact("v1", {"best.safetensors": b"second"})
    server.artifacts = {"me/p/run:v0": first, "me/p/run:latest": first}
    paths = [local_file("wandb:me/p/run:v0", CHECKPOINTS) for _ in range(2)]
    assert paths[0] == paths[1] and paths[0].read_bytes() == b"first"
    assert paths[0].parts[-5:] == ("me", "p", "run", "v0", "best.safetensors")
    wandb_files._kept.cache_clear()  # as in another process
    assert local_file("wandb:me/p/run:v0", CHECKPOINTS) == paths[0]
    assert server.asked == ["me/p/run:v0"]
    assert local_file("wandb:me/p/run:latest", CHECKPOINTS) == paths[0]
    wandb_files._kept.cache_clear()
    server.artifacts["me/p/run:latest"] = second
    assert local_file("wandb:me/p/run:latest", CHECKPOINTS).read_bytes() == b"second"
    assert (first.downloads, second.downloads) == (1, 1)


def test_what_a_broken_download_left_is_no_artifact(server: Server) -> None:
    class Broken(Artifact):
        def download(self, root: str) -> str:
            super().download(root)
            raise ConnectionError("the line went dead")

    server.artifacts["me/p/run:v0"] = Broken("v0", {"best.safetensors": b"half"})
    with pytest.raises(ConfigError, match="cannot get me/p/run:v0 .*the line went dead"):
        local_file("wandb:me/p/run:v0", CHECKPOINTS)
    server.artifacts["me/p/run:v0"] = Artifact("v0", {"best.safetensors": b"whole"})
    assert local_file("wandb:me/p/run:v0", CHECKPOINTS).read_bytes() == b"whole"


def test_the_one_file_that_fits_is_taken_or_the_one_that_is_named(server: Server) -> None:
    files = {"a/best.safetensors": b"1", "notes.md": b"2", "run.json": b"3"}
    server.artifacts["me/p/one:v0"] = Artifact("v0", files)
    server.artifacts["me/p/two:v0"] = Artifact("v0", {**files, "last.safetensors": b"4"})
    server.artifacts["me/p/none:v0"] = Artifact("v0", {"notes.md": b"2"})
    assert local_file("wandb:me/p/one:v0", CHECKPOINTS).read_bytes() == b"1"
    named = local_file("wandb:me/p/two:v0/last.safetensors", CHECKPOINTS)
    assert named.read_bytes() == b"4"
    with pytest.raises(ConfigError, match=r"2 files .*\(a/best.safetensors, last.safetensors\)"):
        local_file("wandb:me/p/two:v0", CHECKPOINTS)
    with pytest.raises(ConfigError, match=r"0 files that end in .safetensors or .pt \(notes.md\)"):
        local_file("wandb:me/p/none:v0", CHECKPOINTS)
    for outside in ("other.pt", "../v1/notes.md"):
        with pytest.raises(ConfigError, match="has no file"):
            local_file(f"wandb:me/p/none:v0/{outside}", CHECKPOINTS)


@pytest.mark.parametrize(
    "given",
    ["wandb:", "wandb:p/run:v0", "wandb:me/p/run", "wandb:me/p/run:v0/", "wandb:me/../run:v0"],
)
def test_a_malformed_reference_gets_the_form(given: str) -> None:
    with pytest.raises(ConfigError, match="is no artifact; write it as wandb:<entity>/<project>"):
        parse_reference(given)


def test_an_artifact_that_is_not_there_gets_one_line(server: Server) -> None:
    with pytest.raises(ConfigError) as error:
        local_file("wandb:me/p/run:v0", CHECKPOINTS)
    assert str(error.value) == (
        "cannot get me/p/run:v0 from Weights & Biases (artifact 'me/p/run:v0' not found); "
        "check the name, the network and `wandb login`"
    )


def test_without_the_package_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb_files._kept.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb:me/p/run:v0 needs the package wandb.*\[wandb\]"):
        local_file("wandb:me/p/run:v0", CHECKPOINTS)


def evaluated(folder: Path, *overrides: str) -> Config:
    return compose([f"run.models_dir={folder}/models", *overrides], "evaluate")


def test_a_checkpoint_and_a_manifest_by_reference(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 4)
    rows = "".join(f"{path.name},{caption}\n" for path, caption in pictures)
    manifest = ("filepath,caption\n" + rows).encode()
    server.artifacts["me/p/data:v2"] = Artifact("v2", {"pairs.csv": manifest})
    server.artifacts["me/p/mine:best"] = Artifact("v5", {"best.safetensors": b"weights"})
    config = evaluated(
        tmp_path,
        "checkpoint=wandb:me/p/mine:best",
        "data=manifest",
        "data.manifest=wandb:me/p/data:v2",
        f"data.root={tmp_path}/pictures",
    )
    with caplog.at_level(logging.INFO):
        assert checkpoint_path(config).read_bytes() == b"weights"
    assert "downloading me/p/mine:best to " in caplog.text
    assert store_path(config) == tmp_path / "models" / "mine" / "store"
    assert logs_path(config) == Path("logs/mine")
    assert isinstance(config.data, ManifestConfig)
    pairs = load_manifest(config.data)
    assert [pairs.path(row) for row in range(4)] == [path for path, _ in pictures]
    assert server.asked == ["me/p/mine:best", "me/p/data:v2"]
