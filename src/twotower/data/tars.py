"""The samples of one tar in webdataset's form: where their pictures lie, and what is said of them.

Members that follow each other with one name up to the first dot are a sample:
`000120007.jpg`, `000120007.txt`, `000120007.json` (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import json
import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from twotower.data.places import last_name
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

JSON = "json."  # before a column that is a field of the .json members
LONGEST_TEXT = 1 << 24  # bytes that are read of a .txt or .json


@dataclass
class Sample:
    """One sample: its key, its members by extension, its captions and what its JSON says."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def first(self, keys: Sequence[str]) -> str | None:
        """The first of some extensions that the sample has."""
        return next((key for key in keys if key in self.members), None)


def alternatives(keys: str) -> list[str]:
    """The names in a key setting, as webdataset writes it: `jpg;png` -> jpg, png."""
    return [key.strip().lower() for key in keys.split(";") if key.strip()]


def index_tar(path: Path, image_key: str, caption_key: str) -> pa.Table:
    """The samples of a tar that have a picture, in their order.

    Args:
        path: the tar; not compressed, so that a picture can be read by itself.
        image_key: extensions of pictures, the first that is there counts: `jpg;png`.
        caption_key: extensions of text members, or `json.<field>`; alike.

    Returns:
        Columns key, name, offset and size in bytes, captions, class (of `.cls`), and a column
        `json.<field>` for each field of the `.json` members, nested ones as JSON.

    Raises:
        ConfigError: it cannot be read, is compressed or incomplete.
    """
    images, texts = alternatives(image_key), alternatives(caption_key)
    found: list[Sample] = []
    others: Counter[str] = Counter()
    broken = 0
    try:
        # Names that are not UTF-8 get signs for what cannot be read, which a table can hold.
        with tarfile.open(path, "r:", encoding="utf-8", errors="replace") as tar:
            for sample in _samples(tar):
                if sample.first(images) is None:
                    others.update(list(sample.members))
                    continue
                broken += not _read_about(tar, sample)
                _read_captions(tar, sample, texts)
                found.append(sample)
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all it has read
            _check_end(tar)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path} is no whole, uncompressed tar ({error}); download or write it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    if broken:
        log.warning("%s: the .json of %d samples is broken and not used", path, broken)
    if others:
        kinds = ", ".join(f".{kind}" for kind, _ in others.most_common(4))
        log.warning(
            "%s: left out samples without a picture (%s); they have %s", path, image_key, kinds
        )
    return _table(found, images)


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse a tar whose last header is no end mark; `tarfile` takes it for the end in silence."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"cut or damaged at byte {tar.offset}")


def _samples(tar: tarfile.TarFile) -> Iterator[Sample]:
    sample: Sample | None = None
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, dot, kind = name.partition(".")
        if not member.isreg() or not dot or not stem:
            continue
        key, kind = posixpath.join(folder, stem), kind.lower()
        if sample is None or sample.key != key or kind in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(key)
        sample.members[kind] = member
    if sample is not None:
        yield sample


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read(LONGEST_TEXT)


def _read_about(tar: tarfile.TarFile, sample: Sample) -> bool:
    """Fill in what the .json and .cls members say; False if the JSON is none."""
    if "cls" in sample.members:
        sample.about["class"] = _read(tar, sample.members["cls"]).decode(errors="replace").strip()
    if "json" not in sample.members:
        return True
    try:
        fields = _parsed(_read(tar, sample.members["json"]))
    except (ValueError, RecursionError):
        return False
    if not isinstance(fields, dict):
        return False
    sample.about |= {f"{JSON}{name}": value for name, value in fields.items()}
    return True


def _parsed(data: bytes) -> Any:
    """What JSON says; halves of surrogate pairs, which no UTF-8 can hold, as question marks."""
    said = json.loads(data)
    text = json.dumps(said, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return said


def _read_captions(tar: tarfile.TarFile, sample: Sample, keys: Sequence[str]) -> None:
    for key in keys:
        if key.startswith(JSON):
            value = _field(sample.about, key)
            texts = value if isinstance(value, list) else [value]
        elif key in sample.members:
            texts = [_read(tar, sample.members[key]).decode("utf-8-sig", errors="replace")]
        else:
            continue
        texts = [" ".join(text.split()) for text in texts if isinstance(text, str)]
        sample.captions = [text for text in texts if text]
        if sample.captions:
            return


def _field(about: dict[str, Any], key: str) -> Any:
    """A field by its name, whatever its case (keys are lower case)."""
    return next((value for name, value in about.items() if name.lower() == key), None)


def _table(samples: Sequence[Sample], images: Sequence[str]) -> pa.Table:
    kinds = [sample.first(images) or "" for sample in samples]
    members = [sample.members[kind] for sample, kind in zip(samples, kinds, strict=True)]
    columns = {
        "key": pa.array([sample.key for sample in samples], pa.large_string()),
        "name": pa.array([last_name(m.name) for m in members], pa.large_string()),
        "offset": pa.array([member.offset_data for member in members], pa.int64()),
        "size": pa.array([member.size for member in members], pa.int64()),
        "captions": pa.array([s.captions for s in samples], pa.list_(pa.large_string())),
    }
    for name in dict.fromkeys(name for sample in samples for name in sample.about):
        columns[name] = column_of([sample.about.get(name) for sample in samples])
    return pa.table(columns)


def column_of(values: Sequence[Any]) -> pa.Array:
    """Values of JSON as a column: of their own type if they share one, else as text."""
    plain = [json.dumps(v) if isinstance(v, dict | list) else v for v in values]
    try:
        column = pa.array(plain)
        # An ordinary Arrow string column ends at 2 GiB.
        return column.cast(pa.large_string()) if pa.types.is_string(column.type) else column
    except (pa.ArrowException, OverflowError):
        texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in plain]
        return pa.array(texts, pa.large_string())
