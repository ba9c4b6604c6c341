"""`twotower <command> --help`: the config groups, and each field that a command reads."""

from __future__ import annotations

import dataclasses
import enum
import re
import textwrap
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, get_args, get_type_hints

from twotower.config import Config
from twotower.data import DATASETS
from twotower.models import MODELS
from twotower.registry import Registry
from twotower.retrieval import INDEXES
from twotower.settings import Choice, plain_number
from twotower.training.loss import LOSSES

WIDTH = 100
KEY_WIDTH = 34

REGISTRIES: dict[str, Registry[Any]] = {r.group: r for r in (MODELS, DATASETS, INDEXES, LOSSES)}

# What each command reads: words of its own, top-level settings, sections.
WORDS: dict[str, dict[str, str]] = {
    "prepare": {
        "backbones": "instead of data=...: lay out the pretrained towers under models/pretrained"
    },
    "doctor": {"path=PATH": "a folder of pictures, a list or table of them, or tars; not data=..."},
    "encode": {"path=PATH": "a folder of pictures, a list or table of them, or tars; not data=..."},
    "store": {
        "info": "what a store holds, and how it was made",
        "verify": "read every byte of it, and encode some rows again",
        "merge": "join stores of one fingerprint (stores.inputs) into a new one (path=...)",
        "compact": "rewrite an updated store in its source's order",
        "path=PATH": "the folder of the store that merge writes",
    },
    "index": {
        "show": "say what a saved index is, and whether its store still has the same rows",
        "path=PATH": "the folder of the index that is shown; by default that of store= and index=",
    },
    "search": {
        "query=TEXT": 'what to find: words, as typed; or a formula of "words", img:<file> and '
        'vec:<file>, as in 2*"dog" + img:pool.jpg - "leash"',
        "query_image=PATH": "pictures that look like this one",
        "query_file=PATH": "many queries: a text file with one a line, or a .npy file of vectors",
        "filter=CONDITION": 'only rows that pass, as in width>=512 and class in ["cat", "dog"]',
    },
    "classify": {"path=PATH": "a picture, or a folder of them, instead of those of the store"},
    "filter": {
        "query=TEXT": "what to find, as in twotower search",
        "query_image=PATH": "pictures that look like this one",
        "filter=CONDITION": "only rows that pass, as in width>=512",
        "output=PATH": "an empty or new folder to copy into; or a .txt, .csv, .tsv, .jsonl or "
        ".parquet file to list in",
    },
    "benchmark": {"--compare PATH": "the same as benchmark.compare=PATH, for any path"},
    "export": {"path=PATH": "the file (format=openai) or the folder to write"},
}
TOP_LEVEL: dict[str, tuple[str, ...]] = {
    "train": ("seed",),
    "doctor": ("seed", "checkpoint"),
    "evaluate": ("seed", "checkpoint"),
    "encode": ("seed", "checkpoint"),
    "store": ("seed", "checkpoint", "store"),
    "index": ("seed", "checkpoint", "store"),
    "search": ("seed", "checkpoint", "store"),
    "classify": ("seed", "checkpoint", "store"),
    "filter": ("seed", "checkpoint", "store"),
    "benchmark": ("seed", "checkpoint", "store"),
    "export": ("checkpoint", "format"),
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("data", "run"),
    "doctor": ("data", "doctor", "distributed", "run"),
    "train": (
        *("model", "data", "loss", "train", "evaluate", "zeroshot", "probe"),
        *("distributed", "run"),
    ),
    "evaluate": ("data", "evaluate", "zeroshot", "distributed", "run"),
    "encode": ("data", "encode", "distributed", "run"),
    "store": ("stores", "distributed", "run"),
    "index": ("index", "indexing", "distributed", "run"),
    "search": ("index", "search", "feedback", "distributed", "run"),
    "classify": ("index", "classify", "distributed", "run"),
    "filter": ("index", "search", "filtering", "distributed", "run"),
    "benchmark": ("index", "benchmark", "distributed", "run"),
    "compare": ("report", "run"),
    "export": ("run",),
    "info": ("run",),
}

SWEPT = ("train", "evaluate", "encode", "benchmark")

_BOUND_WORDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def command_help(name: str) -> str:
    """The help of one command: usage, config groups and options, and the fields that it reads.

    Raises:
        KeyError: no such command.
    """
    sections = SECTIONS[name]
    parts = [f"usage: twotower {name} [key=value ...]"]
    if name in WORDS:
        parts.append(_table("words of its own:", WORDS[name].items()))
    parts.append(_groups_help())
    if name in TOP_LEVEL:
        parts.append(_table("settings at the top:", _fields(Config, "", TOP_LEVEL[name])))
    for section in sections:
        if section in REGISTRIES:
            parts.extend(_choice_help(REGISTRIES[section]))
        else:
            section_class = get_type_hints(Config)[section]
            parts.append(_table(_title(section_class), _fields(section_class, f"{section}.")))
    parts.append(f"twotower {name} --cfg job prints the config as composed.")
    if name in SWEPT:
        parts[-1] += f"\ntwotower {name} -m key=a,b runs one job for each value."
    return "\n\n".join(parts)


def groups() -> dict[str, dict[str, str]]:
    """The config groups of the installed `twotower.conf`: group -> option -> text of its file."""
    found = {}
    for folder in sorted(files("twotower.conf").iterdir(), key=lambda entry: entry.name):
        # Hydra's own groups are for those who know Hydra.
        if folder.is_dir() and folder.name != "hydra":
            entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
            options = {
                entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
                for entry in entries
                if entry.name.endswith(".yaml")
            }
            if options:
                found[folder.name] = options
    return found


def _groups_help() -> str:
    text = files("twotower.conf").joinpath("config.yaml").read_text(encoding="utf-8")
    default = dict(re.findall(r"^ *- (\w+): (\w+)", text, flags=re.MULTILINE))
    found = groups()
    in_order = [group for group in default if group in found]
    rows = []
    for group in [*in_order, *(group for group in found if group not in default)]:
        marks = {default.get(group): " (default)"}
        options = ", ".join(f"{option}{marks.get(option, '')}" for option in found[group])
        rows.append((f"{group}=", options))
    return _table("config groups, group=option:", rows)


def _choice_help(registry: Registry[Any]) -> list[str]:
    """The fields of a group's classes, each under the class that declares it, shared ones first."""
    group = registry.group
    heirs: dict[type[Any], list[str]] = {}
    for name in registry:
        for ancestor in reversed(registry.config_class(name).__mro__):
            if issubclass(ancestor, Choice) and ancestor is not Choice:
                heirs.setdefault(ancestor, []).append(name)
    parts = []
    for declaring, names in sorted(heirs.items(), key=lambda item: -len(item[1])):
        rows = _fields(declaring, f"{group}.", declaring.__dict__.get("__annotations__", {}))
        chosen_by = ", ".join(word for name in names for word in _chosen_by(group, name))
        if declaring.registered_name in names:
            title = f"{chosen_by}: {_title(declaring)}"
            parts.append(_table(title, rows or [("no settings of its own", "")]))
        elif rows:
            everyone = len(names) == len(list(registry))
            parts.append(_table(f"each {group}=...:" if everyone else f"{chosen_by}:", rows))
    return parts


def _chosen_by(group: str, name: str) -> list[str]:
    """The options of a group that choose a registered class: `index=faiss`, `index=hnsw`."""
    schema = re.compile(rf"/schema/{group}/{re.escape(name)}@")
    options = groups().get(group, {})
    found = [f"{group}={option}" for option, text in options.items() if schema.search(text)]
    return found or [f"{group}={name}"]


def _title(config_class: type[Any]) -> str:
    """The first line of a docstring, as a heading."""
    first = (config_class.__doc__ or config_class.__name__).strip().splitlines()[0]
    return first.rstrip(".") + ":"


def _fields(
    config_class: type[Any], prefix: str, only: Iterable[str] | None = None
) -> list[tuple[str, str]]:
    """(`section.field=default`, meaning, kind and range) of each field."""
    hints = get_type_hints(config_class)
    rows = []
    for field in dataclasses.fields(config_class):
        if only is not None and field.name not in only:
            continue
        facts = [_kind(hints[field.name])]
        bounds: Mapping[str, float] = field.metadata.get("bounds", {})
        facts += [f"{_BOUND_WORDS[kind]} {plain_number(bound)}" for kind, bound in bounds.items()]
        meaning = field.metadata.get("meaning", "")
        rows.append((f"{prefix}{field.name}={_default(field)}", f"{meaning} ({', '.join(facts)})"))
    return rows


def _kind(hint: Any) -> str:
    """A type in the user's words; an enum by what may be written."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(member.name for member in hint)
    if get_args(hint):
        kinds = ", ".join(_kind(argument) for argument in get_args(hint))
        if getattr(hint, "__origin__", None) is list:
            return f"list of {kinds}"
        return "config group" if issubclass(get_args(hint)[0], Choice) else str(hint)
    words = {bool: "true | false", int: "integer", float: "number", str: "text"}
    return "integer, or a list of them" if hint is Any else words.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    """A default as it would be typed; nothing where it is computed."""
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if isinstance(value, list):
        items = (f'"{item}"' if "," in str(item) else str(item) for item in value)
        return f"[{','.join(items)}]"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = "" if value is dataclasses.MISSING or value is None else str(value)
    return "..." if text.startswith("${") else text


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Two columns under a title, wrapped at `WIDTH`; a long key stands on a line of its own."""
    lines = textwrap.wrap(title, WIDTH)
    indent = " " * (KEY_WIDTH + 4)
    for key, text in rows:
        head = f"  {key:<{KEY_WIDTH}}  "
        if len(key) > KEY_WIDTH or not text:
            lines.append(f"  {key}")
            head = indent
        lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent)
    return "\n".join(lines)
