"""The zinfo blob inside a zTOC: where inflating can start, and from what state.

For gzip a packed array of checkpoints with their windows; for plain tar a three-number FlatBuffer.
Parsing never copies a window: a checkpoint says where in the blob its window is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from snapshotter.errors import InvalidZtoc
from snapshotter.ztoc.flatbuffers import Shape, Table, Writer
from snapshotter.ztoc.model import Buffer

WINDOW_SIZE = 32768
"""What deflate may refer back to."""

_HEADER = struct.Struct("<iq")
_POINT = struct.Struct("<qqB")
_POINT_SIZE = _POINT.size + WINDOW_SIZE

_V1_FIRST_IN = 10
"""Version 1 does not store the first checkpoint: it takes the gzip header to be the shortest one."""

_TAR_ZINFO = Shape(((0, "i", 0), (1, "q", 0), (2, "q", 0)))
_TAR_ZINFO_VERSION = 2


class Checkpoint(NamedTuple):
    """A state from which inflating can start.

    `compressed_in` is the blob offset of the first whole byte, `bits` (0..7) the number of high bits
    of the byte before it that are still unused, `uncompressed_out` the tar offset of the first byte
    to come out. The 32768 bytes before that one, zeros first where there are not as many, are at
    `window_offset` of the zinfo blob; -1 stands for a window of zeros that is not stored.
    """

    compressed_in: int
    uncompressed_out: int
    bits: int
    window_offset: int


@dataclass(frozen=True, slots=True)
class GzipZinfo:
    """A parsed gzip zinfo; `version` 1 leaves out the first checkpoint, 2 stores all of them."""

    version: int
    span_size: int
    checkpoints: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True)
class TarZinfo:
    """A parsed zinfo of an uncompressed layer: spans are chunks of `span_size`, the blob has `size` bytes."""

    version: int
    span_size: int
    size: int


def parse_gzip(blob: Buffer) -> GzipZinfo:
    """Return the checkpoints in a gzip zinfo.

    Raises InvalidZtoc when the length fits neither version, or a number is out of its range. Whether
    the checkpoints are in order is for the zTOC as a whole (see `parse`).
    """
    if len(blob) < _HEADER.size:
        raise InvalidZtoc(f"zinfo: {len(blob)} bytes are too few for a header")
    count, span_size = _HEADER.unpack_from(blob)
    if count < 1 or span_size < 0:
        raise InvalidZtoc(f"zinfo: impossible header: {count} checkpoints, span size {span_size}")
    stored, rest = divmod(len(blob) - _HEADER.size, _POINT_SIZE)
    version = 2 - (count - stored)
    if rest or version not in {1, 2}:
        raise InvalidZtoc(f"zinfo: {len(blob)} bytes do not hold {count} checkpoints in any version")
    checkpoints = [] if version == 2 else [Checkpoint(_V1_FIRST_IN, 0, 0, -1)]
    for position in range(_HEADER.size, len(blob), _POINT_SIZE):
        compressed_in, uncompressed_out, bits = _POINT.unpack_from(blob, position)
        if bits > 7 or compressed_in < _V1_FIRST_IN or uncompressed_out < 0:
            raise InvalidZtoc(
                f"zinfo: impossible checkpoint {len(checkpoints)}:"
                f" in {compressed_in}, out {uncompressed_out}, {bits} bits"
            )
        checkpoints.append(Checkpoint(compressed_in, uncompressed_out, bits, position + _POINT.size))
    return GzipZinfo(version, span_size, tuple(checkpoints))


class GzipWriter:
    """A gzip zinfo that grows: windows are most of a zTOC's memory, and a list of them would hold it twice."""

    def __init__(self, span_size: int) -> None:
        self._span_size = span_size
        self._blob = bytearray(_HEADER.size)
        self._count = 0

    def add(self, point: tuple[int, int, int, bytes]) -> None:
        """Append a point: compressed_in, uncompressed_out, bits, window of 32768 bytes."""
        self._blob += _POINT.pack(*point[:3])
        self._blob += point[3]
        self._count += 1

    def finish(self) -> bytes:
        """Return the zinfo, of version 2."""
        _HEADER.pack_into(self._blob, 0, self._count, self._span_size)
        return bytes(self._blob)


def write_gzip(span_size: int, points: Sequence[tuple[int, int, int, bytes]], *, version: int = 2) -> bytes:
    """Return the zinfo of `points`, each (compressed_in, uncompressed_out, bits, window of 32768 bytes).

    Version 1 leaves out the first point, which then must be (10, 0, 0, zeros) to be read back alike.
    """
    packed = [_POINT.pack(*point[:3]) + point[3] for point in points]
    return b"".join([_HEADER.pack(len(packed), span_size), *packed[2 - version :]])


def parse_tar(blob: Buffer) -> TarZinfo:
    """Return the zinfo of an uncompressed layer. Raises InvalidZtoc when it is damaged or a number is negative."""
    table = Table.root(bytes(blob), "zinfo")
    zinfo = TarZinfo(table.scalar(0, "i"), table.scalar(1, "q"), table.scalar(2, "q"))
    if zinfo.span_size < 1 or zinfo.size < 0:
        raise InvalidZtoc(f"zinfo: impossible span size {zinfo.span_size} or layer size {zinfo.size}")
    return zinfo


def write_tar(span_size: int, size: int) -> bytes:
    """Return the zinfo of an uncompressed layer of `size` bytes."""
    writer = Writer()
    return writer.finish(writer.table(_TAR_ZINFO, (_TAR_ZINFO_VERSION, span_size, size)))
