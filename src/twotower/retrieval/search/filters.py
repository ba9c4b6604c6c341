"""Which rows of a store pass a filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from twotower.embedding.layout import IntArray
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.search.filter_grammar import Filter
from twotower.settings import ConfigError


def passing(store: EmbeddingStore, wanted: Filter) -> IntArray:
    """The ids of the rows of a store that pass a filter, ascending.

    Raises:
        ConfigError: pyarrow cannot evaluate it.
    """
    masks = []
    for place in range(max(1, len(store.manifest.shards))):
        masks.append(_mask(store, place, wanted))
    return np.sort(store.row_ids()[np.concatenate(masks)])


def _mask(store: EmbeddingStore, place: int, wanted: Filter) -> Any:
    """Which rows of a shard pass: (n,) bool."""
    # The id is there to say how many rows there are, whatever the shard has.
    table = store.table(place, list({"row_id": None, **dict.fromkeys(wanted.schema.names)}))
    columns = {
        field.name: table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in wanted.schema
    }
    rows = pa.table({"row_id": table["row_id"], **columns})
    try:
        found = ds.dataset(rows).to_table(columns={"passes": wanted.expression})["passes"]
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the filter {wanted.text} cannot be evaluated: {reason}") from error
    return found.fill_null(False).to_numpy()
