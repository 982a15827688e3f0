"""Compressed frames of DICOM: what they say of their size, and whether they were cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from medbudget.data.items import BrokenCase
from medbudget.pictures import list_jpeg_markers


def check_streams(frames: Sequence[bytes], rows: int, columns: int) -> None:
    """Refuse JPEG, JPEG-LS and JPEG 2000 streams that have no end, or another size."""
    for frame in frames:
        if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise BrokenCase("truncated: a compressed frame has no end")
        if (size := _read_size(frame)) != (rows, columns):
            raise BrokenCase(
                f"a compressed frame is of size {size}, the header of {(rows, columns)}"
            )


def _read_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns that a stream states."""

    def read(start: int, width: int) -> int:
        return int.from_bytes(stream[start : start + width], "big")

    if stream[:2] == b"\xff\xd8":
        for kind, place in list_jpeg_markers(stream).items():
            if kind in (0xF7, *range(0xC0, 0xD0)) and kind not in (0xC4, 0xC8, 0xCC):
                return read(place + 5, 2), read(place + 7, 2)
        return None
    start = stream.find(b"\xff\x4f\xff\x51") + 8  # JPEG 2000, in a JP2 file or bare
    return read(start + 4, 4) - read(start + 12, 4), read(start, 4) - read(start + 8, 4)


@contextmanager
def silence() -> Iterator[None]:
    """Discard what GDCM prints, past Python, when it passes over data behind an image."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
