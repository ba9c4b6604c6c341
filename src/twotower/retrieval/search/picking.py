"""What `twotower filter` does: the best pictures of a query, copied or listed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import is_taken, replacing
from twotower.config import Config, FreeText
from twotower.console import say
from twotower.data.places import last_name, read_bytes
from twotower.retrieval.search.opening import open_searcher
from twotower.retrieval.search.searcher import Hit
from twotower.retrieval.search.session import given_queries, options_of
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")


def pick(config: Config, free: FreeText) -> None:
    """Find the best `filtering.num_results` pictures, write them to `output=`, and say how many.

    Raises:
        ConfigError: the output or the query is missing or not fit, or nothing can be written.
    """
    if not free.output:
        raise ConfigError(
            f"filter needs output=<folder to copy pictures into>, or a list: {', '.join(LISTS)}"
        )
    output = Path(free.output)
    is_list = output.suffix.lower() in LISTS
    if not is_list:
        check_folder(output)
    queries = given_queries(free)
    if not queries:
        raise ConfigError('filter needs a query, for example query="a dog on the beach"')
    if len(queries) > 1:
        raise ConfigError(
            f"filter takes one query, and {free.query_file} has {len(queries)}; run it once for "
            "each, with an output= of its own"
        )
    asked = options_of(config, free)
    searcher = open_searcher(config, filter_text=asked.filter)
    # Unlike a search's k, the number is a limit that a small store need not reach.
    count = min(config.filtering.num_results, len(searcher))
    options = dataclasses.replace(asked, k=count, threshold=config.filtering.threshold)
    hits = searcher.search(queries, options)[0]
    if is_list:
        write_list(hits, output)
        say(f"listed {len(hits)} pictures in {output}")
    else:
        copied = copy_pictures(hits, output)
        say(f"copied {copied} of {len(hits)} pictures into {output}")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which something could be overwritten.

    Raises:
        ConfigError: it is a file or not empty.
    """
    if is_taken(folder):
        raise ConfigError(f"{folder} is not empty; give output= a new folder, or a file to list in")


def copy_pictures(hits: Sequence[Hit], folder: Path) -> int:
    """Copy the pictures of hits into an empty folder, each under its own name; how many were there.

    Of two with one name the second has its rank before it. What cannot be read is named in the log.

    Raises:
        ConfigError: the folder cannot be written.
    """
    count = 0
    for hit in hits:
        try:
            data = read_bytes(hit.path)
        except OSError as error:
            log.warning("%s is not copied: %s", hit.path, error.strerror or error)
            continue
        name = last_name(str(hit.path))
        target = folder / name
        if target.exists():
            target = folder / f"{hit.rank}_{name}"
        with replacing(target) as temporary:
            temporary.write_bytes(data)
        count += 1
    return count


def write_list(hits: Sequence[Hit], path: Path) -> None:
    """Write the paths of hits, one a line (.txt), or with caption and score as a manifest.

    Raises:
        ConfigError: the file cannot be written.
    """
    paths = [os.path.abspath(hit.path) for hit in hits]
    rows = {
        "filepath": paths,
        "caption": [hit.caption for hit in hits],
        "score": [hit.score for hit in hits],
        "row_id": [hit.row_id for hit in hits],
    }
    table = pa.table({**rows, "collection": [hit.collection for hit in hits]})
    kind = path.suffix.lower()
    with replacing(path) as temporary:
        if kind == ".parquet":
            pq.write_table(table, temporary)
        elif kind in (".csv", ".tsv"):
            options = pa_csv.WriteOptions(delimiter="," if kind == ".csv" else "\t")
            pa_csv.write_csv(table, temporary, options)
        elif kind == ".jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            temporary.write_text("".join(f"{name}\n" for name in paths), "utf-8")
