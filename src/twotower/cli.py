"""The command line: one word chooses the command, the rest are Hydra overrides and free text.

Nothing heavy is imported until a command is known, so `twotower --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from difflib import get_close_matches

COMMANDS = {
    "prepare": "lay out a data set (data=...) or the pretrained backbones (prepare backbones)",
    "doctor": "find faults, duplicates and leaks in a data set, and write a cleaned manifest",
    "train": "train a variant (model=...) on a data set (data=...)",
    "evaluate": "measure a checkpoint's retrieval on a split: recall both ways, median rank",
    "encode": "turn images and captions into an embedding store, on one or many processes",
    "store": "look at a store (store info), verify, merge or compact stores",
    "index": "build and save an index of a store, or say what a saved one is (index show)",
    "search": "find pictures by words (query=...) or by a picture (query_image=...)",
    "classify": "label pictures (path=... or a store) with the nearest words of a vocabulary",
    "filter": "copy or list the best pictures of a query (query=... output=...)",
    "benchmark": "compare the exact index with FAISS indexes on the same rows and queries",
    "compare": "put the measurements of all runs into one table: which variant wins",
    "export": "write a checkpoint for others (path=...): format=openai, open_clip, hf or onnx",
    "info": "show the machine, the versions and what is available",
}

FREE_TEXT = ("query", "query_image", "query_file", "filter", "path", "output")

# The free text that each command reads; `verb` is a bare word.
READS = {
    "prepare": ("verb",),
    "doctor": ("path",),
    "encode": ("path",),
    "store": ("verb", "path"),
    "index": ("verb", "path"),
    "search": ("query", "query_image", "query_file", "filter"),
    "classify": ("path",),
    "filter": ("query", "query_image", "filter", "output"),
    "benchmark": ("compare",),
    "export": ("path",),
}

COMPARE = "--compare"  # takes the next word, which is a path and no verb

# Hydra's options whose value is the next word, which is then no verb.
OPTIONS_WITH_VALUE = (
    *("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd"),
    *("--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
)

USAGE = "usage: twotower <command> [key=value ...]        twotower <command> --help"


def split_free_text(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Take the free text and the verb out of a command's arguments, byte for byte.

    Returns them by name, and the rest, which are Hydra's: overrides and options. The verb is the
    first word that is neither an override nor an option nor an option's value.
    """
    free: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if rest and rest[-1] == COMPARE:
            rest.pop()
            free["compare"] = argument
            continue
        is_word = not equals and not argument.startswith(("-", "~"))
        after_option = bool(rest) and rest[-1] in OPTIONS_WITH_VALUE
        if equals and (key in FREE_TEXT or key == COMPARE):
            free[key.lstrip("-")] = value
        elif is_word and "verb" not in free and not after_option:
            free["verb"] = argument
        else:
            rest.append(argument)
    return free, rest


def refused(name: str, free: dict[str, str]) -> str:
    """The sentence about free text that a command does not read; empty if it reads all of it."""
    unread = [key for key in free if key not in READS.get(name, ())]
    if not unread:
        return ""
    if unread[0] == "compare":
        return f"{name} does not know {COMPARE}; twotower benchmark does"
    if unread[0] != "verb":
        return f"{name} does not read {unread[0]}="
    if name == "search":
        return f"search takes words as query=..., for example query={shlex.quote(free['verb'])}"
    return f"{name} does not know the word {free['verb']}; it takes settings as key=value"


def say(text: str) -> None:
    """Print for the user."""
    sys.stdout.write(text + "\n")


def fail(sentence: str) -> int:
    """Print one sentence on stderr; the exit code."""
    sys.stderr.write(f"twotower: {sentence}\n")
    return 1


def overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 after a sentence on stderr, or 130 after Ctrl-C."""
    try:
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\ntwotower: stopped\n")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; else Python would try again at its end and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(arguments: list[str]) -> int:
    """Answer what needs no command, refuse what is none, or import the command and run it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(overview())
        return 0
    if arguments[0] == "--version":
        from twotower import __version__

        say(f"twotower {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "twotower --help lists the commands"
        return fail(f"no such command: {name}; {hint}")
    free, rest = split_free_text(arguments[1:])
    if sentence := refused(name, free):
        return fail(sentence)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from twotower.hydra_app import run_command

    command = importlib.import_module(f"twotower.commands.{name}")
    return run_command(name, command.run, free, rest)
