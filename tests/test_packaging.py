"""What setup.cfg says is what a wheel holds."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel that is built from the files a clone would have."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "_scan*")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").glob("twotower-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel."""
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))).namelist()


def test_without_a_compiler_the_wheel_installs_and_searches(tmp_path: Path) -> None:
    path = build_wheel(tmp_path, CC="no-such-compiler")
    with zipfile.ZipFile(path) as wheel:
        assert not [name for name in wheel.namelist() if "/_scan." in name]
        wheel.extractall(tmp_path / "site")
    search = """
import numpy, twotower
from twotower.retrieval import INDEXES
from twotower.retrieval.scan import tiers
from twotower.retrieval.exact import ExactConfig
index = INDEXES.build(ExactConfig(), 8)
rows = numpy.random.default_rng(0).standard_normal((500, 8))
index.add(rows)
assert (index.search(rows, 1).ids[:, 0] == numpy.arange(500)).all()
print(twotower.__file__, tiers.describe(), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", search],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place, tier = done.stdout.splitlines()
    assert place == str(tmp_path / "site" / "twotower" / "__init__.py")
    assert tier.startswith(("tier 2", "tier 3")) and "the C extension was not built" in tier


def test_packages_are_those_under_src(setup_cfg: configparser.ConfigParser) -> None:
    listed = setup_cfg["options"]["packages"].split()
    found = setuptools.find_packages(str(ROOT / "src"))
    assert listed == sorted([*found, "twotower.conf"])


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "src" / "twotower").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_every_source_and_every_config(wheel: list[str]) -> None:
    source = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "twotower").rglob("*.py")}
    config = {
        f"twotower/conf/{path.relative_to(ROOT / 'conf')}"
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    nested = "twotower/conf/hydra/job_logging/twotower.yaml"
    assert nested in config
    expected = {*source, *config, "twotower/conf/__init__.py", "twotower/py.typed"}
    held = {name for name in wheel if name.startswith("twotower/")}
    (compiled,) = held - expected
    assert compiled.startswith("twotower/retrieval/scan/_scan.")
    assert expected < held


def test_extras_are_those_of_the_scripts_and_the_readme(
    setup_cfg: configparser.ConfigParser,
) -> None:
    extras = setup_cfg["options.extras_require"]
    assert list(extras) == [
        *(
            "cpu",
            "gpu",
            "heif",
            "http",
            "lora",
            "milvus",
            "onnx",
            "parity",
            "wandb",
            "optuna",
            "ray",
            "slurm",
        ),
        *("quickstart", "test", "dev"),
    ]
    bounded = [*setup_cfg["options"]["install_requires"].strip().splitlines()]
    for requirements in extras.values():
        bounded += requirements.strip().splitlines()
    assert [line for line in bounded if ">=" not in line and "==" not in line] == []


def test_entry_point_answers() -> None:
    script = Path(sys.executable).parent / "twotower"
    by_script = subprocess.run([script, "--help"], capture_output=True, text=True)
    by_module = subprocess.run(
        [sys.executable, "-m", "twotower", "--help"], capture_output=True, text=True
    )
    assert by_script.returncode == by_module.returncode == 0
    assert by_script.stdout == by_module.stdout
