"""The command line before Hydra: what it lists, refuses, and keeps byte for byte."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import twotower.commands
from twotower.cli import COMMANDS, main, refused, split_free_text

QUERIES = ["a dog, running", "what's this (black)?", "浜辺を走る犬", "a=b", "null", "5", "{x}"]


def test_every_command_has_a_module_and_every_module_is_a_command() -> None:
    modules = {module.name for module in pkgutil.iter_modules(twotower.commands.__path__)}
    assert modules == set(COMMANDS)


def test_help_names_each_command_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)
    assert max(map(len, lines)) <= 100


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
before = set(sys.modules)
from twotower.cli import main
main(["--help"])
print(*{name.split(".")[0] for name in set(sys.modules) - before}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    third_party = set(done.stderr.split()) - sys.stdlib_module_names
    assert third_party == {"twotower"}


def test_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("serch", "twotower: no such command: serch; did you mean search?\n"),
        ("xyz", "twotower: no such command: xyz; twotower --help lists the commands\n"),
        ("lr=3", "twotower: no such command: lr=3; twotower --help lists the commands\n"),
    ],
)
def test_unknown_command(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 1
    assert capsys.readouterr() == ("", sentence)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twotower {twotower.__version__}\n"


@pytest.mark.parametrize(
    "query", [*QUERIES, "", " ", "query=x", "a\nb", "--help", "${oc.env:HOME}"]
)
def test_free_text_never_reaches_hydra(query: str) -> None:
    arguments = ["search.k=3", f"query={query}", "query_image=a b.jpg", "-m"]
    free, rest = split_free_text(arguments)
    assert free == {"query": query, "query_image": "a b.jpg"}
    assert rest == ["search.k=3", "-m"]


@pytest.mark.parametrize(
    ("arguments", "verb", "rest"),
    [
        (["backbones"], "backbones", []),
        (["data=openmoji", "backbones", "more"], "backbones", ["data=openmoji", "more"]),
        (["--cfg", "job", "--config-dir", "mine"], None, ["--cfg", "job", "--config-dir", "mine"]),
        (["~data", "-m", "+a.b=1"], None, ["~data", "-m", "+a.b=1"]),
    ],
)
def test_verb_is_the_first_bare_word(arguments: list[str], verb: str, rest: list[str]) -> None:
    free, left = split_free_text(arguments)
    assert (free.get("verb"), left) == (verb, rest)


def test_the_path_of_compare_never_reaches_hydra() -> None:
    for option in (["--compare", "a=b {x}.jsonl"], ["--compare=a=b {x}.jsonl"]):
        free, rest = split_free_text(["benchmark.k=3", *option, "-m"])
        assert (free, rest) == ({"compare": "a=b {x}.jsonl"}, ["benchmark.k=3", "-m"])
    assert refused("benchmark", free) == ""
    assert refused("train", free) == "train does not know --compare; twotower benchmark does"


def test_words_that_a_command_does_not_read_are_refused() -> None:
    assert refused("search", {"verb": "a dog"}) == (
        "search takes words as query=..., for example query='a dog'"
    )
    assert refused("train", {"verb": "lr"}) == (
        "train does not know the word lr; it takes settings as key=value"
    )
    assert refused("train", {"query": "lr"}) == "train does not read query="
    assert refused("search", {"query": "x", "query_image": "y"}) == ""


def test_queries_reach_the_command_byte_for_byte(tmp_path: Path) -> None:
    """From the process's arguments, past the whole of Hydra, to the command."""
    script = """
import json, sys, types
from twotower.cli import main
search = types.ModuleType("twotower.commands.search")
search.run = lambda config, free: print(json.dumps([free.query, config.search.k]))
sys.modules[search.__name__] = search
for argument in sys.argv[1:]:
    assert main(["search", argument, "search.k=7"]) == 0
"""
    arguments = [f"query={query}" for query in QUERIES]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, cwd=tmp_path, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[q, 7] for q in QUERIES]
