"""The gates close: each lets good code through and stops what is planted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources and the settings of the gates, to plant things in."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def gate(folder: Path, tool: str, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [BIN / tool, *arguments],
        cwd=folder,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def lint_imports(folder: Path) -> tuple[int, str]:
    return gate(folder, "lint-imports", "--no-logo", "--no-cache")


def plant(folder: Path, module: str, line: str) -> None:
    path = folder / "src" / "twotower" / module
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")


def test_layers_hold(copy: Path) -> None:
    code, text = lint_imports(copy)
    assert code == 0, text


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("metrics.py", "from twotower.training import loss", "metrics is not allowed to import"),
        ("config.py", "def f():\n    import twotower.cli", "config is not allowed to import"),
        ("models/dual_encoder.py", "import twotower.data.pairs", "models is not allowed to import"),
        ("retrieval/index.py", "import twotower.evaluation", "retrieval is not allowed to import"),
        ("newcomer.py", "", "twotower.newcomer"),
    ],
)
def test_planted_import_is_seen(copy: Path, module: str, line: str, complaint: str) -> None:
    """Upward, hidden in a function, between siblings; and a module that no layer names."""
    plant(copy, module, line)
    code, text = lint_imports(copy)
    assert code == 1
    assert complaint in " ".join(text.split())


def test_untyped_function_is_seen(copy: Path) -> None:
    """On the modules that everything stands on; mypy's settings are the repository's."""
    package = copy / "src" / "twotower"
    kept = {f"{name}.py" for name in ("__init__", "config", "registry", "settings")}
    kept |= {path.name for path in package.glob("*_config.py")}
    for path in package.iterdir():
        if path.name not in {*kept, "py.typed"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache = f"--cache-dir={copy / 'cache'}"
    code, text = gate(copy, "mypy", cache)
    assert code == 0, text
    plant(copy, "registry.py", "def untyped(x):\n    return x")
    code, text = gate(copy, "mypy", cache)
    assert code == 1
    assert "Function is missing a type annotation  [no-untyped-def]" in text
    assert f"Found 1 error in 1 file (checked {len(kept)} source files)" in text


@pytest.mark.parametrize(
    ("line", "rule"),
    [("print(1)", "T201"), ("import os", "F401"), (f"X = '{'x' * 100}'", "E501")],
)
def test_ruff_sees_what_is_planted(copy: Path, line: str, rule: str) -> None:
    assert gate(copy, "ruff", "check", "--no-cache", "src/twotower/config.py")[0] == 0
    plant(copy, "config.py", line)
    code, text = gate(copy, "ruff", "check", "--no-cache", "src/twotower/config.py")
    assert code == 1
    assert rule in text


def test_scripts_pass_shellcheck_and_a_planted_mistake_does_not(tmp_path: Path) -> None:
    scripts = sorted(map(str, (ROOT / "scripts").glob("*.sh")))
    code, text = gate(ROOT, "shellcheck", "-x", "-P", "SCRIPTDIR", *scripts, ".ci/run")
    assert code == 0, text
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    code, text = gate(tmp_path, "shellcheck", "bad.sh")
    assert code == 1
    assert "SC2086" in text


TESTS = {
    "passes": "def test_it(): pass",
    "for a GPU": "import pytest\n@pytest.mark.skip(reason='needs a GPU')\ndef test_it(): pass",
    "marked": "import pytest\n@pytest.mark.skip(reason='later')\ndef test_it(): pass",
    "called": "import pytest\ndef test_it(): pytest.skip('later')",
    "fixture": (
        "import pytest\n@pytest.fixture\ndef f(): pytest.skip('later')\ndef test_it(f): pass"
    ),
    "whole module": "import pytest\npytest.importorskip('no_such_module')",
}


@pytest.mark.parametrize("kind", TESTS)
def test_skip_is_a_failure_but_for_a_missing_gpu(tmp_path: Path, kind: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_planted.py").write_text(TESTS[kind])
    code, text = gate(tmp_path, "pytest", "-p", "no:cacheprovider")
    assert (code == 0) == (kind in ("passes", "for a GPU")), text
    assert ("A test may be skipped only for a missing GPU." in text) == (code != 0)
