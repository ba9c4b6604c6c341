"""The scripts, each run in a copy of the repository's frame with stand-ins for the tools."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBERED = {
    "1_finetune_openai.sh": ["train", "model=openai_finetune"],
    "1_pretrain_openai.sh": ["train", "model=openai_pretrain"],
    "1_pretrain_bert_resnet.sh": ["train", "model=bert_resnet"],
    "2_encode.sh": ["encode"],
    "3_search.sh": ["search"],
    "4_benchmark.sh": ["benchmark"],
    "5_compare.sh": ["compare"],
}

# Answers what the scripts ask of `python3`; `pip install` fails while the file `broken` exists.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-m venv")
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "made $4" >>log
    for tool in twotower ruff mypy lint-imports shellcheck pytest; do
      printf '#!/usr/bin/env bash\\necho "%s $*" >>log\\n' $tool >"$4/bin/$tool"
      printf '[[ ! -e fail-%s ]] || exit 3\\n' $tool >>"$4/bin/$tool"
      chmod +x "$4/bin/$tool"
    done
    printf '#!/usr/bin/env bash\\necho "pip 1 from %s/lib"\\n' "$PWD/$4" >"$4/bin/pip"
    chmod +x "$4/bin/pip"
    ;;
  "-m pytest") echo "$0 -m pytest ${*:3}" >>log ;;
  "-m pip") echo "installed ${!#}" >>log && [[ ! -e broken ]] ;;
  "--version "*) echo "Python 3.11.0" ;;
esac
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository's frame, in a folder with a space in its name."""
    root = tmp_path / "two tower"
    for folder in ("dataset", "models", "logs", "src", "tests", "conf", "tools"):
        (root / folder).mkdir(parents=True)
    for folder in ("scripts", ".ci"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "src" / "twotower" / "retrieval" / "scan").mkdir(parents=True)
    scan = "src/twotower/retrieval/scan/scan"
    for name in ("setup.cfg", "setup.py", "pyproject.toml", f"{scan}.c", f"{scan}_kernels.h"):
        shutil.copy(ROOT / name, root / name)
    program(root / "tools" / "python3", PYTHON)
    return root


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(
    root: Path, script: str, *arguments: str, answer: str = ""
) -> subprocess.CompletedProcess[str]:
    """A script started from another folder, with the stand-ins first on PATH."""
    path = f"{root / 'tools'}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(root / script), *arguments],
        cwd=root.parent,
        env={**os.environ, "PATH": path},
        input=answer,
        capture_output=True,
        text=True,
    )


def logged(root: Path) -> list[str]:
    lines = (root / "log").read_text().splitlines()
    (root / "log").unlink()
    return lines


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def test_numbered_scripts_are_short_and_strict() -> None:
    found = sorted(path.name for path in (ROOT / "scripts").glob("[0-9]_*.sh"))
    assert found == sorted(["0_install.sh", *NUMBERED])
    for name in found:
        lines = (ROOT / "scripts" / name).read_text().splitlines()
        assert len(lines) <= 15
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines


@pytest.mark.parametrize("script", NUMBERED)
def test_arguments_are_passed_on_as_they_are(root: Path, script: str) -> None:
    says = '#!/usr/bin/env bash\nprintf \'%s\\0\' {} "$PWD" "$@"\n'
    arguments = ["query=what's this (black)?", "train.lr=1e-3", "a=b  c", "x=*"]
    done = run(root, f"scripts/{script}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "twotower is not installed; run: bash scripts/0_install.sh\n"
    for where, place in (("path", "tools"), ("venv", ".venv/bin")):
        program(root / place / "twotower", says.format(where))
        done = run(root, f"scripts/{script}", *arguments)
        assert done.stdout.split("\0")[:-1] == [where, str(root), *NUMBERED[script], *arguments]


def test_install_is_done_once_and_again_when_the_requirements_change(root: Path) -> None:
    first = run(root, "scripts/0_install.sh")
    assert first.returncode == 0, first.stderr
    assert logged(root) == ["made .venv", "installed .[cpu,quickstart]"]
    second = run(root, "scripts/0_install.sh")
    assert second.stdout.startswith(".venv is up to date: nothing to install\n")
    assert not (root / "log").exists()
    with (root / "setup.cfg").open("a") as file:
        file.write("# more\n")
    assert run(root, "scripts/0_install.sh").returncode == 0
    assert logged(root) == ["installed .[cpu,quickstart]"]
    assert run(root, "scripts/0_install.sh", "gpu").returncode == 0
    assert logged(root) == ["installed .[gpu]"]


def test_interrupted_install_is_taken_up_again(root: Path) -> None:
    touch(root, "broken")
    assert run(root, "scripts/0_install.sh").returncode == 1
    (root / "broken").unlink()
    assert run(root, "scripts/0_install.sh").returncode == 0
    assert logged(root) == [
        "made .venv",
        "installed .[cpu,quickstart]",
        "installed .[cpu,quickstart]",
    ]


def test_moved_repository_makes_its_environment_anew(root: Path) -> None:
    assert run(root, "scripts/0_install.sh").returncode == 0
    moved = root.rename(root.parent / "moved")
    assert run(moved, "scripts/0_install.sh").returncode == 0
    assert logged(moved)[2:] == ["made .venv", "installed .[cpu,quickstart]"]


def test_environment_of_another_kind_is_not_touched(root: Path) -> None:
    touch(root, ".venv/mine")
    done = run(root, "scripts/0_install.sh")
    assert done.returncode == 1
    assert ".venv is not a working environment that these scripts made" in done.stderr
    assert (root / ".venv" / "mine").exists()


def test_old_python_is_refused_with_a_sentence(root: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        program(root / "tools" / name, "#!/usr/bin/env bash\nexit 1\n")
    done = run(root, "scripts/0_install.sh")
    assert done.returncode == 1
    assert "twotower needs Python 3.11 or newer with venv" in done.stderr
    assert not (root / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "more", "last_lines"),
    [
        ([], "", ["pytest -m not slow"]),
        (
            ["--all"],
            ",optuna,ray,slurm",
            [
                "pytest ",
                "made .venv-parity",
                "installed .",
                ".venv-parity/bin/python -m pytest tests/parity",
            ],
        ),
    ],
)
def test_gates_run_in_order(
    root: Path, arguments: list[str], more: str, last_lines: list[str]
) -> None:
    done = run(root, "scripts/test.sh", *arguments)
    assert done.returncode == 0, done.stderr
    scripts = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
    assert logged(root) == [
        "made .venv-test",
        f"installed .[cpu,heif,lora,milvus,onnx,quickstart,wandb,test,dev{more}]",
        "ruff check src tests conf",
        "ruff format --check src tests conf",
        "mypy ",
        "lint-imports --no-logo",
        f"shellcheck -x -P SCRIPTDIR {' '.join(f'scripts/{n}' for n in scripts)} .ci/run",
        *last_lines,
    ]
    assert "every gate passed" in done.stdout


def test_first_failing_gate_ends_the_run(root: Path) -> None:
    touch(root, "fail-mypy")
    done = run(root, "scripts/test.sh")
    assert done.returncode == 3
    assert "== mypy failed" in done.stderr
    assert logged(root)[-1] == "mypy "


def test_unknown_word_to_the_gates_is_refused(root: Path) -> None:
    done = run(root, "scripts/test.sh", "--most")
    assert (done.returncode, done.stderr) == (1, "usage: bash scripts/test.sh [--all]\n")


def test_ci_runs_every_gate(root: Path) -> None:
    program(root / "scripts" / "test.sh", 'echo "test.sh $*"\n')
    assert run(root, ".ci/run").stdout == "test.sh --all\n"


EVERYTHING = [
    "dataset/.gitkeep",
    "dataset/README.md",
    "dataset/my photos/a b.jpg",
    "dataset/.hidden",
    "dataset/line\nend",
    "dataset/-rf",
    "models/.gitkeep",
    "models/README.md",
    "models/run 1/best.safetensors",
    "models/run 1/store/manifest.json",
    "models/run 1/index/x",
    "models/run 1/README.md",
    "models/pretrained/store of mine",
    "logs/README.md",
    "logs/run 1/train/train.log",
    "src/store/keep",
]


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        ("dataset", EVERYTHING[2:6]),
        ("models", EVERYTHING[8:13]),
        ("indexes", EVERYTHING[9:11]),
        ("logs", EVERYTHING[14:15]),
        ("all", [*EVERYTHING[2:6], *EVERYTHING[8:13], *EVERYTHING[14:15]]),
    ],
)
def test_clean_deletes_what_it_names_and_nothing_else(
    root: Path, what: str, gone: list[str]
) -> None:
    touch(root, *EVERYTHING)
    refused = run(root, "scripts/clean.sh", what, answer="n\n")
    assert (refused.returncode, refused.stderr) == (1, "nothing was deleted\n")
    assert all((root / name).exists() for name in EVERYTHING)
    assert refused.stdout.startswith("this will be deleted:\n")
    assert refused.stdout.splitlines()[-1].split()[1] == "total"
    for name in gone:
        assert "/".join(name.split("/")[:2]).split("\n")[0] in refused.stdout

    done = run(root, "scripts/clean.sh", "--yes", what)
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name in EVERYTHING if not (root / name).exists()] == gone
    again = run(root, "scripts/clean.sh", what, "--yes")
    assert (again.returncode, again.stdout) == (0, "nothing to delete\n")


def test_clean_asks(root: Path) -> None:
    touch(root, "logs/a")
    assert run(root, "scripts/clean.sh", "logs", answer="").returncode == 1
    assert (root / "logs" / "a").exists()
    assert run(root, "scripts/clean.sh", "logs", answer="y\n").returncode == 0
    assert not (root / "logs" / "a").exists()


def test_clean_follows_no_link(root: Path) -> None:
    touch(root.parent, "elsewhere/store/keep", "elsewhere/keep")
    outside = root.parent / "elsewhere"
    (root / "models" / "link").symlink_to(outside)
    assert run(root, "scripts/clean.sh", "indexes", "--yes").stdout == "nothing to delete\n"
    assert run(root, "scripts/clean.sh", "models", "--yes").returncode == 0
    assert not (root / "models" / "link").is_symlink()
    shutil.rmtree(root / "logs")
    (root / "logs").symlink_to(outside)
    done = run(root, "scripts/clean.sh", "all", "--yes")
    assert done.returncode == 1
    assert done.stderr == "logs is a link to another folder; empty that one yourself\n"
    assert (outside / "store" / "keep").exists()
    assert (outside / "keep").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "usage: bash scripts/clean.sh dataset|models|indexes|logs|all [--yes]"),
        (["src"], "cannot clean src; usage: "),
        (["../x", "--yes"], "cannot clean ../x; usage: "),
        (["logs", "models"], "one thing at a time, or all; usage: "),
    ],
)
def test_clean_refuses_what_it_does_not_know(
    root: Path, arguments: list[str], sentence: str
) -> None:
    touch(root, *EVERYTHING)
    done = run(root, "scripts/clean.sh", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(sentence)
    assert all((root / name).exists() for name in EVERYTHING)
