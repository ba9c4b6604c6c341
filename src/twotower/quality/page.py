"""The report as one HTML page: no script, no network, pictures inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from twotower.data.images import UnreadableImage, decode_image
from twotower.data.pairs import PairTable
from twotower.doctor_config import COPIES, EMBEDDED, FAULTS, MEANINGS, TRAITS
from twotower.quality.style import STYLE

SIDE = 150  # pixels of a thumbnail's longer side
LONGEST_SHOWN = 600  # characters of a caption
BARS = 10  # classes shown at either end
EXACT = ("leak", "duplicate")
TITLES = {
    "leak": "Leaks between splits",
    "near_leak": "Near leaks between splits",
    "duplicate": "Exact duplicates",
    "near_duplicate": "Near duplicates",
    EMBEDDED: "Near by embedding",
}


@dataclass(frozen=True)
class Page:
    """What the page shows: the source, its findings (`findings.SCHEMA`), and the summary."""

    pairs: PairTable
    findings: pa.Table
    summary: dict[str, Any]
    max_shown: int

    def html(self) -> str:
        """The whole page."""
        name = escape(self.summary["data"])
        parts = [
            f"<h1>{name}</h1><p class=lead>{escape(verdict(self.summary))}</p>",
            self._tiles(),
            self._table(),
            *(self._copies(kind) for kind in (*COPIES, EMBEDDED)),
            *(self._faults(kind) for kind in FAULTS),
            *(self._pictures(kind) for kind in TRAITS),
            self._captions(),
            self._classes(),
            self._files(),
        ]
        head = f"<meta charset=utf-8><title>{name}: twotower doctor</title><style>{STYLE}</style>"
        view = '<meta name=viewport content="width=device-width">'
        body = "\n".join(part for part in parts if part)
        return f"<!doctype html><html lang=en><head>{head}{view}</head><body>{body}</body></html>\n"

    def _tiles(self) -> str:
        found, images = self.summary["findings"], self.summary["images"]
        captions = self.summary["captions"]
        cut = captions["too_long"] / max(captions["captions"], 1)
        tiles = [
            ("images", f"{images:,}", ""),
            ("with a fault", _sum(found, FAULTS), "bad"),
            ("leaks between splits", _sum(found, ("leak", "near_leak")), "bad"),
            ("duplicates in a split", _sum(found, ("duplicate", "near_duplicate")), "warn"),
            ("captions cut", f"{cut:.1%}", "warn"),
            ("images that stay", f"{self.summary['images_kept']:,}", "good"),
        ]
        cells = []
        for label, value, kind in tiles:
            mark = "" if value in ("0", "0.0%") else kind
            cells.append(f"<div class='tile {mark}'><b>{value}</b>{label}</div>")
        return f"<div class=tiles>{''.join(cells)}</div>"

    def _table(self) -> str:
        found = self.summary["findings"]
        if not found:
            return ""
        rows = [
            f"<tr><td><a href='#{kind}'>{_words(kind)}</a><td>{MEANINGS[kind]}"
            f"<td class=n>{count:,}<td class=n>{count / self.summary['images']:.2%}"
            f"<td>{'left out' if self._is_removed(kind) else 'stays'}"
            for kind, count in found.items()
        ]
        head = (
            "<tr><th>finding<th>what it means<th class=n>images<th class=n>share<th>in the manifest"
        )
        return f"<table>{head}{''.join(rows)}</table>"

    def _of(self, kind: str) -> pa.Table:
        return self.findings.filter(pc.equal(self.findings["kind"], kind))

    def _section(self, kind: str, title: str, shown: int, count: int, body: str) -> str:
        some = f", {shown} shown" if shown < count else ""
        note = f"{count:,} {'image' if count == 1 else 'images'}{some}: {MEANINGS[kind]}"
        return f"<h2 id='{kind}'>{title}</h2><p>{note}.</p>{body}"

    def _copies(self, kind: str) -> str:
        """Each repeated image beside the one that it repeats, the least alike first."""
        rows = self._of(kind)
        if not len(rows):
            return ""
        order = [("similarity", "ascending"), ("source_row", "ascending")]
        shown = rows.sort_by(order).slice(0, self.max_shown).to_pylist()
        cards = []
        for row in shown:
            both = [self._picture(row["source_row"]), self._picture(row["of_row"])]
            alike = "the same pixels" if kind in EXACT else f"{row['similarity']:.3f} alike"
            cards.append(f"<div class=pair>{''.join(both)}<p>{alike}</p></div>")
        notes = ["Of each pair the left one is left out."] if self._is_removed(kind) else []
        notes += [] if kind in EXACT else ["The least alike come first."]
        body = f"<p>{' '.join(notes)}</p><div class=grid>{''.join(cards)}</div>"
        return self._section(kind, TITLES[kind], len(shown), len(rows), body)

    def _is_removed(self, kind: str) -> bool:
        return kind in self.summary["removed_for"]

    def _faults(self, kind: str) -> str:
        """Files and reasons; nothing that has a fault is opened again."""
        rows = self._of(kind)
        if not len(rows):
            return ""
        shown = rows.slice(0, self.max_shown).to_pylist()
        lines = []
        for row in shown:
            path = escape(str(self.pairs.table["filepath"][row["source_row"]]))
            split = escape(str(self.pairs.table["split"][row["source_row"]]))
            lines.append(
                f"<tr><td><code>{path}</code><td class=split>{split}<td>{escape(row['detail'])}"
            )
        body = f"<table>{''.join(lines)}</table>"
        return self._section(kind, _title(kind), len(shown), len(rows), body)

    def _pictures(self, kind: str) -> str:
        rows = self._of(kind)
        if not len(rows):
            return ""
        shown = rows.slice(0, self.max_shown).to_pylist()
        cells = [self._picture(row["source_row"], row["detail"]) for row in shown]
        body = f"<div class=grid>{''.join(cells)}</div>"
        return self._section(kind, _title(kind), len(shown), len(rows), body)

    def _picture(self, row: int, note: str = "") -> str:
        path = self.pairs.path(row)
        split = str(self.pairs.table["split"][row])
        caption = f"{escape(note)}<br>" if note else ""
        source = thumbnail(path)
        image = f"<img src='{source}' alt=''>" if source else "<div class=none>no picture</div>"
        name = f"<span title='{escape(str(path), quote=True)}'>{escape(path.name)}</span>"
        text = f"<figcaption>{caption}{name} <i>{escape(split)}</i></figcaption>"
        return f"<figure>{image}{text}</figure>"

    def _captions(self) -> str:
        facts = self.summary["captions"]
        cut = facts["too_long"] / max(facts["captions"], 1)
        lines = [
            f"{facts['captions']:,} captions, the longest of {facts['longest']:,} characters.",
            f"{facts['too_long']:,} ({cut:.2%}) have more than {facts['length']} tokens "
            f"({escape(facts['tokenizer'])}) and lose their end.",
        ]
        return "".join(
            [
                f"<h2>Captions</h2><p>{'<br>'.join(lines)}</p>",
                self._left_out(),
                self._pictures("no_caption"),
                self._long_captions(),
            ]
        )

    def _left_out(self) -> str:
        facts = self.summary["captions"]
        count, first = facts["left_out"], facts["left_out_first"]
        if not count:
            return ""
        some = f", {len(first)} shown" if len(first) < count else ""
        items = "".join(f"<li><code>{escape(text)}</code></li>" for text in first)
        note = f"{count:,} without a caption, which the source itself leaves out{some}:"
        return f"<p>{note}</p><ul>{items}</ul>"

    def _long_captions(self) -> str:
        rows = self._of("long_caption")
        if not len(rows):
            return ""
        shown = [row["source_row"] for row in rows.slice(0, self.max_shown).to_pylist()]
        items = [
            f"<li><code>{escape(self.pairs.path(row).name)}</code> "
            f"{escape(_shortened(max(self.pairs.captions(row), key=len)))}</li>"
            for row in shown
        ]
        body = f"<ul>{''.join(items)}</ul>"
        return self._section("long_caption", "Long caption", len(shown), len(rows), body)

    def _classes(self) -> str:
        facts = self.summary.get("classes")
        if not facts or not facts["classes"]:
            return ""
        images = list(facts["images"].items())
        ends = images if len(images) <= 2 * BARS else [*images[:BARS], ("...", 0), *images[-BARS:]]
        bars = []
        for label, count in ends:
            width = 100 * count / facts["largest"]
            bar = f"{count:,}<td class=wide><div class=bar style='width:{width:.1f}%'></div>"
            bars.append(f"<tr><td>{escape(label)}<td class=n>{bar if count else '<td>'}")
        note = (
            f"{facts['classes']:,} classes: {facts['largest']:,} images in the largest, "
            f"{facts['median']:,} in the median one, {facts['smallest']:,} in the smallest."
        )
        if facts["images_without_class"]:
            note += f" Images without a class: {facts['images_without_class']:,}."
        if outside := facts["only_outside_train"]:
            more = ", ..." if len(outside) > BARS else ""
            named = escape(", ".join(outside[:BARS]))
            note += f" In no training image: {len(outside):,} ({named}{more})."
        return f"<h2>Classes</h2><p>{note}</p><table>{''.join(bars)}</table>"

    def _files(self) -> str:
        rows = [
            f"<tr><td><code>{escape(name)}</code><td>{escape(meaning)}"
            for name, meaning in self.summary["files"].items()
        ]
        use = self.summary["use"]
        use = f"<p>Use it with <code>{escape(use)}</code></p>" if use else ""
        return f"<h2>Files</h2><table>{''.join(rows)}</table>{use}"


def verdict(summary: dict[str, Any]) -> str:
    """The findings in a sentence."""
    images, kept = summary["images"], summary["images_kept"]
    if kept == images:
        return f"{images:,} images verified; nothing is left out of the cleaned manifest."
    return (
        f"{images:,} images verified; {images - kept:,} are left out of the cleaned manifest, "
        f"{kept:,} stay. No file was changed."
    )


def thumbnail(path: Path) -> str | None:
    """A picture as a small JPEG in a data URL; None for one that cannot be read."""
    try:
        image = decode_image(path)
    except UnreadableImage:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."


def _title(kind: str) -> str:
    words = _words(kind)
    return words[0].upper() + words[1:]


def _words(kind: str) -> str:
    return kind.replace("_", " ").replace("exif", "EXIF").replace("cmyk", "CMYK")


def _sum(found: dict[str, int], kinds: Iterable[str]) -> str:
    return f"{sum(found.get(kind, 0) for kind in kinds):,}"
