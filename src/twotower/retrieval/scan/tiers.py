"""Which scan an exact index uses: the fastest of three that works on this machine."""

from __future__ import annotations

import enum
from typing import Protocol

from twotower.retrieval.index import AnyFloatArray, Float64Array, IdArray
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan import native, torch_scan
from twotower.retrieval.scan.candidates import Best
from twotower.retrieval.scan.certificate import CODED_DIM
from twotower.retrieval.scan.certified_scan import Coded
from twotower.retrieval.scan.native_scan import NativeScan
from twotower.retrieval.scan.torch_scan import TorchScan
from twotower.settings import ConfigError


class Tier(enum.Enum):
    """How rows are scanned."""

    auto = "auto"
    native = "native"
    torch = "torch"
    reference = "reference"


class Scan(Protocol):
    """A scan that keeps something of its own beside the rows."""

    @property
    def coded(self) -> Coded:
        """The rows' codes."""

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""

    def append(self, rows: AnyFloatArray) -> None:
        """Take note of rows that were added to the index."""

    def delete(self, positions: IdArray) -> None:
        """Never find these rows again."""

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""


def choose_tier(asked: Tier) -> Tier:
    """The tier that is asked for, or the fastest.

    Raises:
        ConfigError: the one that is asked for does not run here.
    """
    if asked is Tier.native and native.library() is None:
        raise ConfigError(f"index.tier=native does not run here: {NO_LIBRARY}; use index.tier=auto")
    if asked is Tier.torch and not torch_scan.probe().right:
        raise ConfigError(f"index.tier=torch does not run here: {NO_PRODUCT}; use index.tier=auto")
    if asked is not Tier.auto:
        return asked
    if native.library():
        return Tier.native
    return Tier.torch if torch_scan.probe().faster else Tier.reference


NO_LIBRARY = "the C extension was not built, for want of a compiler perhaps"
NO_PRODUCT = "torch's int8 product is missing or slower than fp32"


def make_scan(asked: Tier, rows: Rows) -> Scan | None:
    """The scan of a tier; None for the reference, which every exact index has.

    It is the reference for vectors that are too long for codes, too.

    Raises:
        ConfigError: as `choose_tier` does.
    """
    tier = choose_tier(asked)
    if rows.dim > CODED_DIM:
        return None
    if tier is Tier.native:
        return NativeScan(rows)
    return TorchScan(rows) if tier is Tier.torch else None


def describe() -> str:
    """The tier of `index=exact` on this machine and why, for `twotower info`."""
    if native.library():
        return f"tier 1, C: {native.level_name(native.level())}"
    if torch_scan.probe().faster:
        return f"tier 2, int8 in torch; {NO_LIBRARY}"
    return f"tier 3, fp32 in torch; {NO_LIBRARY}; {NO_PRODUCT}"
