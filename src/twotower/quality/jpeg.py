"""Damage inside a JPEG's compressed data that decoders pass over in silence (ITU T.81, annex B)."""

from __future__ import annotations

import re

from twotower.data.jpeg import START_OF_SCAN, segments

# In compressed data FF stands before 00, before a restart, or before the marker that ends it.
END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
RESERVED = range(0x01, 0xC0)  # no encoder writes these
# Counts of the codes of T.81's table K.5, which most cameras and programs use as it stands. Under
# it nothing that is seen gives a run of zero bits; tables made for one picture can (a white sky).
USUAL_TABLE = bytes.fromhex("0002010303020403050504040000017d")
HOLE = bytes(64)


def damage(data: bytes) -> str:
    """What is wrong with the first scan of a JPEG, in a few words; empty if nothing is seen."""
    first = _scan(data)
    if first is None:
        return ""
    end = END.search(data, first)
    if end is not None and end.group()[-1] in RESERVED:
        return f"no marker can be FF{end.group()[-1]:02X}, at byte {end.start()}"
    if USUAL_TABLE in data[:first]:
        hole = data.find(HOLE, first, end.start() if end else len(data))
        if hole >= 0:
            return f"a hole of zeros at byte {hole}"
    return ""


def _scan(data: bytes) -> int | None:
    """Where the compressed data begins; None where the segments before it make no sense."""
    return next((end for marker, end in segments(data) if marker == START_OF_SCAN), None)
