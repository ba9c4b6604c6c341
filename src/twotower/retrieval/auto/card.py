"""The index card: what was tried, what was measured, and what to do with what was chosen."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.checkpoint.atomic import replacing
from twotower.retrieval.auto.measure import Interval

CARD = "index_card"
SMALL_GAP = 0.01  # of recall, which the draw of the queries may make


@dataclass
class Tried:
    """One candidate: how it was set, what it takes, what it finds; a note says why it fell out.

    Attributes:
        tuned: the settings of the search that were tuned.
        recalls: by kind of query, `text` and `image`.
        if_tuned_on_images: recalls with the settings that suffice for pictures.
        reaches, quick, fits: whether it meets the target and the budgets.
    """

    name: str
    config: dict[str, Any]
    build_seconds: float
    bytes_per_vector: float
    tuned: dict[str, int] = field(default_factory=dict)
    recalls: dict[str, Interval] = field(default_factory=dict)
    if_tuned_on_images: dict[str, float] = field(default_factory=dict)
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    reaches: bool = True
    quick: bool = True
    fits: bool = True
    note: str = ""

    def summary(self) -> str:
        """What was measured, in a line."""
        found = ", ".join(
            f"{name} recall {share.value:.3f}" for name, share in self.recalls.items()
        )
        return f"{found}, {self.p50_ms:.2f} ms, {self.bytes_per_vector:,.0f} bytes a vector"


@dataclass
class Card:
    """What `index=auto` has found out.

    Attributes:
        queries: what they were, in words.
        about: rows, dimension, what was asked for, machine and versions.
        tuned_on: the kind of query that settings were tuned on; empty if nothing was.
    """

    chosen: str
    reason: str
    tried: list[Tried]
    queries: str
    about: dict[str, Any]
    target_recall: float
    k: int
    tuned_on: str = ""
    advice: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def best(self) -> Tried:
        """The one that was chosen."""
        return next(entry for entry in self.tried if entry.name == self.chosen)

    def warning(self) -> str:
        """The sentence about text queries that miss what picture queries reach; mostly empty."""
        text, image = (self.best.recalls.get(name) for name in ("text", "image"))
        if text is None or image is None or not text.value < self.target_recall <= image.value:
            return ""
        return (
            f"text queries find {text.value:.3f} of the best {self.k}, below the target "
            f"{self.target_recall:g}, though picture queries find {image.value:.3f}; give more "
            "memory or time, or take index=exact"
        )


def advice(card: Card) -> list[str]:
    """What follows from the figures, a sentence each."""
    best = card.best
    found = []
    if warning := card.warning():
        found.append(warning)
    if card.tuned_on == "image":
        found.append(
            "the store has no captions, so nothing is known of text queries, which may find less: "
            "encode a source with captions, and index again"
        )
    gaps = [
        entry
        for entry in card.tried
        if entry.if_tuned_on_images
        and entry.if_tuned_on_images["image"] - entry.if_tuned_on_images["text"] > SMALL_GAP
    ]
    if gaps:
        worst = min(gaps, key=lambda entry: entry.if_tuned_on_images["text"])
        usual = worst.if_tuned_on_images
        found.append(
            f"tuned on pictures, as is usual, {worst.name} would find {usual['image']:.3f} for "
            f"pictures and only {usual['text']:.3f} for texts"
        )
    if "HNSW" in best.name and "IVF" not in best.name:
        found.append("HNSW deletes no rows: after deletions build it again")
    if "IVF" in best.name or "PQ" in best.name:
        found.append("its centroids fit the rows of today: measure again when many are added")
    if best.config.get("rerank"):
        found.append("results are re-ranked by the store's rows: keep store and index together")
    return found


def to_plain_card(card: Card) -> dict[str, Any]:
    """The card as JSON can hold it."""
    plain = dataclasses.asdict(card)
    for entry, tried in zip(plain["tried"], card.tried, strict=True):
        entry["recalls"] = {name: share._asdict() for name, share in tried.recalls.items()}
    return {"format": 1, **plain}


def markdown(card: Card) -> str:
    """The card for people."""
    lines = [f"# Index card: {card.chosen}", "", f"Chosen: {card.reason}.", ""]
    lines += [f"{line}.\n" for line in card.advice]
    lines += table(card)
    if card.tuned_on:
        lines += ["", f"Queries: {card.queries}."]
        lines += [
            f"Settings are tuned on {card.tuned_on} queries to a recall@{card.k} of "
            f"{card.target_recall:g}. Intervals are of 95 % (Wilson, queries as trials).",
        ]
    gaps = [entry for entry in card.tried if entry.if_tuned_on_images]
    if gaps:
        lines += ["", "If settings were tuned on pictures instead:", ""]
        lines += ["| index | image recall | text recall |", "| --- | ---: | ---: |"]
        for entry in gaps:
            usual = entry.if_tuned_on_images
            lines.append(f"| {entry.name} | {usual['image']:.3f} | {usual['text']:.3f} |")
    lines += ["", "| | |", "| --- | --- |"]
    facts = {**card.about, "fingerprint": card.fingerprint}
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def table(card: Card) -> list[str]:
    """The candidates as the lines of a Markdown table, the chosen one first."""
    kinds = list(next((e.recalls for e in card.tried if e.recalls), {}))
    heads = ["index", "settings", *(f"{kind} recall@{card.k}" for kind in kinds)]
    heads += ["p50 ms", "p95 ms", "build s", "bytes/vector", "note"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for entry in sorted(card.tried, key=lambda one: one.name != card.chosen):
        shares = [_share(entry.recalls.get(kind)) for kind in kinds]
        settings = " ".join(f"{name}={value}" for name, value in entry.tuned.items())
        times = [f"{value:.2f}" if entry.p50_ms else "-" for value in (entry.p50_ms, entry.p95_ms)]
        seconds = f"{entry.build_seconds:.1f}" if entry.build_seconds else "-"
        note = "**chosen**" if entry.name == card.chosen else entry.note
        cells = [entry.name, settings or "-", *shares, *times, seconds]
        lines.append("| " + " | ".join([*cells, f"{entry.bytes_per_vector:,.0f}", note]) + " |")
    return lines


def _share(share: Interval | None) -> str:
    return "-" if share is None else f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    return str(value).replace("|", "\\|")


def write_card(card: Card, folder: Path) -> None:
    """Write index_card.json and index_card.md beside an index.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with replacing(folder / f"{CARD}.json") as temporary:
        temporary.write_text(json.dumps(to_plain_card(card), indent=1) + "\n")
    with replacing(folder / f"{CARD}.md") as temporary:
        temporary.write_text(markdown(card))


def remove_card(folder: Path) -> None:
    """Take away the card of an earlier index."""
    for ending in ("json", "md"):
        (folder / f"{CARD}.{ending}").unlink(missing_ok=True)
