"""What was found, a row an image and finding, and what of the images stays for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.pairs import PairTable
from twotower.doctor_config import FAULTS, MEANINGS, TRAITS
from twotower.quality.captions import CaptionFacts
from twotower.quality.groups import Grouped

Rows = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    [
        ("source_row", pa.int64()),
        ("kind", pa.string()),
        ("detail", pa.large_string()),
        ("of_row", pa.int64()),
        ("similarity", pa.float32()),
    ]
)


def _table(
    kind: str,
    rows: Sequence[int] | Rows,
    details: Sequence[str] | None = None,
    of: Sequence[int] | None = None,
    similarity: Sequence[float] | None = None,
) -> pa.Table:
    count = len(rows)
    columns: list[Any] = [rows, [kind] * count, details or [""] * count]
    columns += [of or [None] * count, similarity or [None] * count]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def of_pictures(found: pa.Table) -> pa.Table:
    """Faults and traits that the scan saw."""
    size = pc.binary_join_element_wise(
        found["width"].cast(pa.string()), found["height"].cast(pa.string()), " x "
    )
    described = pc.binary_join_element_wise(found["format"], size, ", ")
    tables = [SCHEMA.empty_table()]
    for kind in FAULTS:
        rows = np.flatnonzero(pc.equal(found["fault"], kind).to_numpy())
        tables.append(_table(kind, rows, found["reason"].take(pa.array(rows)).to_pylist()))
    owners = pc.list_parent_indices(found["traits"]).to_numpy()
    flat = pc.list_flatten(found["traits"])
    for kind in TRAITS:
        rows = owners[pc.equal(flat, kind).to_numpy()] if len(owners) else np.empty(0, np.int64)
        tables.append(_table(kind, rows, described.take(pa.array(rows)).to_pylist()))
    return pa.concat_tables(tables)


def of_captions(facts: CaptionFacts) -> pa.Table:
    """Images without captions, and those with captions that are cut."""
    cut = np.flatnonzero(facts.cut)
    details = [f"{count} cut at {facts.length} tokens" for count in facts.cut[cut].tolist()]
    return pa.concat_tables(
        [_table("no_caption", facts.without), _table("long_caption", cut, details)]
    )


def of_copies(grouped: Grouped) -> pa.Table:
    """Duplicates and leaks."""
    tables = [SCHEMA.empty_table()]
    for kind in dict.fromkeys(copy.kind for copy in grouped.copies):
        rows, of, _, similarity = zip(*(c for c in grouped.copies if c.kind == kind), strict=True)
        tables.append(_table(kind, rows, None, of, similarity))
    return pa.concat_tables(tables)


def of_embeddings(kind: str, pairs: Rows, cosines: npt.NDArray[np.float32]) -> pa.Table:
    """Of pairs (P, 2) that a checkpoint hardly tells apart each later row, with its nearest."""
    order = np.argsort(-cosines, kind="stable")
    _, best = np.unique(pairs[order, 1], return_index=True)
    chosen = order[best]
    near = pairs[chosen]
    return _table(kind, near[:, 1], None, near[:, 0].tolist(), cosines[chosen].tolist())


def rows_with(findings: pa.Table, kinds: Collection[str], count: int) -> npt.NDArray[np.bool_]:
    """Which of `count` images have a finding of these kinds: (count,)."""
    rows = np.zeros(count, bool)
    named = pc.is_in(findings["kind"], pa.array(list(kinds), pa.string()))
    rows[findings["source_row"].filter(named).to_numpy()] = True
    return rows


def counts(findings: pa.Table) -> dict[str, int]:
    """Findings of each kind, the worst kinds first, without those that did not occur."""
    table = pc.value_counts(findings["kind"]).to_pylist()
    found = {entry["values"]: int(entry["counts"]) for entry in table}
    return {kind: found[kind] for kind in MEANINGS if kind in found}


def report(findings: pa.Table, pairs: PairTable, group: Rows, removed: Collection[str]) -> pa.Table:
    """The findings in the words of the source: which file, of which split, and what it repeats."""
    rows = findings["source_row"]
    named = pc.is_in(findings["kind"], pa.array(list(removed), pa.string()))
    return pa.table(
        {
            "source_row": rows,
            "filepath": pairs.table["filepath"].take(rows),
            "split": pairs.table["split"].take(rows),
            "kind": findings["kind"],
            "detail": findings["detail"],
            "of": pairs.table["filepath"].take(findings["of_row"]),
            "similarity": findings["similarity"],
            "group": pa.array(group).take(rows),
            "removed": named,
        }
    )
