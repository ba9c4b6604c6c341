"""`twotower <command> --help` shows every group, option and field, with its meaning."""

from __future__ import annotations

import dataclasses
import re
from typing import get_type_hints

import pytest

from twotower.cli import COMMANDS, READS
from twotower.config import Config
from twotower.config_help import REGISTRIES, SECTIONS, TOP_LEVEL, WORDS, command_help, groups
from twotower.hydra_app import compose
from twotower.settings import Section

PLAIN = {
    name: hint
    for name, hint in get_type_hints(Config).items()
    if issubclass(hint, Section) and name not in REGISTRIES
}
CHOICES = [(group, name) for group, registry in REGISTRIES.items() for name in registry]


def classes() -> list[tuple[str, type[Section]]]:
    chosen = [(group, REGISTRIES[group].config_class(name)) for group, name in CHOICES]
    return [*PLAIN.items(), *chosen]


def readers(section: str) -> list[str]:
    return [command for command, sections in SECTIONS.items() if section in sections]


def shown(command: str) -> dict[str, str]:
    """Key -> default as the help shows them."""
    return dict(re.findall(r"^  ([\w.]+)=(.*?)(?:  .*)?$", command_help(command), re.MULTILINE))


def test_every_command_has_help() -> None:
    assert list(SECTIONS) == list(COMMANDS)
    assert set(WORDS) == set(READS)


@pytest.mark.parametrize(("section", "section_class"), classes())
def test_every_field_has_a_meaning_and_is_shown(section: str, section_class: type[Section]) -> None:
    commands = readers(section)
    assert commands, f"no command reads {section}"
    for field in dataclasses.fields(section_class):
        meaning = field.metadata.get("meaning", "")
        assert meaning, f"{section}.{field.name} has no meaning"
        for command in commands:
            text = " ".join(command_help(command).split())
            assert f" {section}.{field.name}=" in text
            assert " ".join(meaning.split()) in text


def test_settings_at_the_top_have_a_meaning_and_are_shown() -> None:
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name not in {*PLAIN, *REGISTRIES}}
    assert {name for names in TOP_LEVEL.values() for name in names} == set(fields)
    for command, names in TOP_LEVEL.items():
        for name in names:
            assert fields[name].metadata["meaning"] in " ".join(command_help(command).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable_at_100_columns(command: str) -> None:
    lines = command_help(command).splitlines()
    assert [line for line in lines if len(line) > 100 or line != line.rstrip()] == []


def test_every_option_of_every_group_is_shown() -> None:
    text = " ".join(command_help("train").split())
    for group, options in groups().items():
        names = ", ".join(re.escape(option) + r"(?: \(default\))?" for option in options)
        assert re.search(rf" {group}= {names}", text)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_registered_class_is_chosen_by_an_option(group: str, name: str) -> None:
    assert any(f"/schema/{group}/{name}@" in text for text in groups()[group].values())


def test_kind_range_and_default_stand_beside_the_meaning() -> None:
    text = " ".join(command_help("train").split())
    assert " train.beta2=0.98 AdamW decay rate of the variance (number, at least 0, less" in text
    assert "(fp32 | bf16 | fp16)" in text
    text = " ".join(command_help("benchmark").split())
    assert 'benchmark.indexes=[exact,Flat,"IVF64,Flat",HNSW32,SQ8] ' in text
    assert "(list of text)" in text


def test_defaults_as_shown_can_be_typed() -> None:
    """What the help shows as `key=default` is an override that gives the default."""
    typed = {
        key: default
        for command in COMMANDS
        for key, default in shown(command).items()
        if key.split(".")[0] in PLAIN and default not in ("", "...")
    }
    config = compose([f"{key}={default}" for key, default in typed.items()])
    for section, section_class in PLAIN.items():
        if section != "run":
            assert getattr(config, section) == section_class()
    assert len(typed) > 40
