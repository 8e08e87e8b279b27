"""FlatBuffers, as much of it as the format uses: a checked reader and a byte-exact writer.

A FlatBuffer is laid down from its end towards its front. Tables point back to a vtable that says
where each field is; equal vtables are stored once. Two builders agree byte for byte only if they
add the same things in the same order, pad alike and share vtables alike, so the writer fixes all of
that: fields in the order of the shape, defaults left out, empty tail of a vtable cut off, strings
never shared.

The reader never trusts an offset or a length: each is compared with the buffer before it is used,
and nothing is allocated by a number that the buffer only claims.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Sequence
from typing import NamedTuple

from snapshotter.errors import InvalidZtoc

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_SCALARS = {fmt: struct.Struct("<" + fmt) for fmt in "biIq"}

U32_SIZE = 4
_VTABLE_HEADER = 4
_OFFSET = "o"
_TERMINATORS = tuple(bytes(1 + padding) for padding in range(U32_SIZE))
"""By the padding behind it."""


class Table:
    """One table of a buffer; `what` names it in messages. Reading a field that is absent gives its default.

    Raises InvalidZtoc wherever something points outside the buffer.
    """

    def __init__(self, data: bytes, position: int, what: str) -> None:
        self._data = data
        self._position = position
        self.what = what
        self.fields = vtable_fields(data, position, what)

    @classmethod
    def root(cls, data: bytes, what: str) -> Table:
        """Return the root table of a buffer."""
        if len(data) < U32_SIZE:
            raise InvalidZtoc(f"{what}: {len(data)} bytes are too few for a table")
        return cls(data, _U32.unpack_from(data)[0], what)

    def scalar(self, slot: int, fmt: str, default: int = 0) -> int:
        """Return a number field; `fmt` is its struct letter."""
        at = self._field(slot, _SCALARS[fmt].size)
        return default if at is None else int(_SCALARS[fmt].unpack_from(self._data, at)[0])

    def string(self, slot: int) -> bytes:
        """Return a string field without its terminator; empty when absent."""
        start, end = self.byte_vector(slot)
        return self._data[start:end]

    def byte_vector(self, slot: int) -> tuple[int, int]:
        """Return the range of the buffer that a vector of bytes (or a string) occupies; (0, 0) when absent."""
        return self._vector(slot, 1)

    def strings(self, slot: int) -> list[bytes]:
        """Return a vector of strings. Their sizes may not add up to more than the buffer."""
        budget = len(self._data)
        found = []
        for position in self.offsets(slot):
            start, end = vector_range(self._data, position, 1, f"{self.what}, field {slot}")
            budget -= end - start + U32_SIZE
            if budget < 0:
                raise InvalidZtoc(f"{self.what}, field {slot}: strings are larger than the buffer")
            found.append(self._data[start:end])
        return found

    def offsets(self, slot: int) -> list[int]:
        """Return the positions that a vector of offsets points to; they are not checked yet."""
        start, end = self._vector(slot, U32_SIZE)
        relative = struct.unpack_from(f"<{(end - start) // U32_SIZE}I", self._data, start)
        return [at + offset for at, offset in zip(range(start, end, U32_SIZE), relative, strict=True)]

    def table(self, slot: int, what: str) -> Table:
        """Return a table field. Raises InvalidZtoc when it is absent too."""
        at = self._field(slot, U32_SIZE)
        if at is None:
            raise InvalidZtoc(f"{self.what}: has no {what}")
        return Table(self._data, at + _U32.unpack_from(self._data, at)[0], what)

    def _field(self, slot: int, size: int) -> int | None:
        offset = self.fields.offsets[slot] if slot < len(self.fields.offsets) else 0
        if not offset:
            return None
        if offset + size > self.fields.table_size:
            raise InvalidZtoc(f"{self.what}: field {slot} lies outside its table")
        return self._position + offset

    def _vector(self, slot: int, item_size: int) -> tuple[int, int]:
        at = self._field(slot, U32_SIZE)
        if at is None:
            return 0, 0
        position = at + _U32.unpack_from(self._data, at)[0]
        return vector_range(self._data, position, item_size, f"{self.what}, field {slot}")


class VtableFields(NamedTuple):
    """A checked vtable: the size of its tables, and each slot's offset within them (0: absent)."""

    table_size: int
    offsets: tuple[int, ...]


def vtable_position(data: bytes, table: int, what: str) -> int:
    """Return where the vtable of the table at `table` is said to be; raises InvalidZtoc outside the buffer."""
    if table + U32_SIZE > len(data):
        raise InvalidZtoc(f"{what}: lies outside the buffer")
    position: int = table - _I32.unpack_from(data, table)[0]
    if not 0 <= position <= len(data) - _VTABLE_HEADER:
        raise InvalidZtoc(f"{what}: vtable lies outside the buffer")
    return position


def vtable_fields(data: bytes, table: int, what: str) -> VtableFields:
    """Return the vtable of the table at `table`, of which all fields begin within the buffer."""
    position = vtable_position(data, table, what)
    size, table_size = struct.unpack_from("<HH", data, position)
    if size < _VTABLE_HEADER or size % 2 or position + size > len(data) or table + table_size > len(data):
        raise InvalidZtoc(f"{what}: impossible vtable of {size} bytes for a table of {table_size}")
    count = (size - _VTABLE_HEADER) // 2
    return VtableFields(table_size, struct.unpack_from(f"<{count}H", data, position + _VTABLE_HEADER))


def vector_range(data: bytes, position: int, item_size: int, what: str) -> tuple[int, int]:
    """Return the range of the items of the vector at `position`; raises InvalidZtoc outside the buffer."""
    start = position + U32_SIZE
    if start > len(data):
        raise InvalidZtoc(f"{what}: lies outside the buffer")
    end: int = start + _U32.unpack_from(data, position)[0] * item_size
    if end > len(data):
        raise InvalidZtoc(f"{what}: ends outside the buffer")
    return start, end


class Shape:
    """The fields of a kind of table: (slot, struct letter, default), in the order in which they are added.

    The letter "o" stands for an offset to something written before; its absence is 0.
    """

    def __init__(self, fields: Sequence[tuple[int, str, int]]) -> None:
        self.fields = tuple(fields)
        self.defaults = tuple(default for _, _, default in self.fields)
        self.layout = functools.cache(self._layout)

    def _layout(self, phase: int, present: tuple[bool, ...]) -> _Layout:
        """Lay out a table whose tail is at `phase` modulo 8, with the fields that are present.

        The phase decides the padding, so a layout is good for every table that agrees in both.
        """
        tail = phase
        align = U32_SIZE
        forward: list[str] = []
        references = []
        places: dict[int, int] = {}
        for index, (slot, letter, _) in enumerate(self.fields):
            if not present[index]:
                continue
            fmt = "I" if letter == _OFFSET else letter
            size = _SCALARS[fmt].size
            align = max(align, size)
            padding = -tail % size
            tail += padding + size
            forward.append(f"{fmt}{padding}x")
            places[slot] = tail
            references.append((index, tail - phase if letter == _OFFSET else 0))
        padding = -tail % U32_SIZE
        tail += padding + U32_SIZE
        slots = range(max(places, default=-1) + 1)
        vtable = [tail - places[slot] if slot in places else 0 for slot in slots]
        header = (_VTABLE_HEADER + 2 * len(vtable), tail - phase)
        return _Layout(
            pack=struct.Struct("<i" + "".join([f"{padding}x", *reversed(forward)])),
            sources=tuple(reversed(references)),
            size=tail - phase,
            align=align,
            vtable=struct.pack(f"<{len(vtable) + 2}H", *header, *vtable),
        )


class _Layout(NamedTuple):
    """How one table is packed. `sources` gives for each packed field its index in the shape and, for
    an offset field, its distance from the table's tail."""

    pack: struct.Struct
    sources: tuple[tuple[int, int], ...]
    size: int
    align: int
    vtable: bytes


class Writer:
    """Builds one buffer. Positions are distances from the end, as that is where building begins.

    Everything that is added returns its position, for use in a table or vector added later.
    """

    def __init__(self) -> None:
        self._reversed: list[bytes] = []
        self._size = 0
        self._align = U32_SIZE
        self._vtables: dict[bytes, int] = {}

    def string(self, text: bytes) -> int:
        """Add a string with its length and terminator."""
        return self.strings((text,))[0]

    def strings(self, texts: Sequence[bytes]) -> list[int]:
        """Add one string after the other and return their positions; several at once cost half as much."""
        size = self._size
        positions = []
        for text in texts:
            length = len(text)
            padding = -(size + length + 1) % U32_SIZE
            self._reversed.append(_U32.pack(length) + text + _TERMINATORS[padding])
            size += U32_SIZE + length + 1 + padding
            positions.append(size)
        self._size = size
        return positions

    def byte_vector(self, data: bytes) -> int:
        """Add a vector of bytes."""
        padding = -(self._size + len(data)) % U32_SIZE
        # Three parts, not one: the data may be most of the buffer.
        self._reversed += (bytes(padding), data, _U32.pack(len(data)))
        self._size += U32_SIZE + len(data) + padding
        return self._size

    def offsets(self, positions: Sequence[int]) -> int:
        """Add a vector of references to what was added before."""
        count = len(positions)
        padding = -self._size % U32_SIZE
        self._size += padding + U32_SIZE * count
        relative = [self._size - U32_SIZE * i - position for i, position in enumerate(positions)]
        self._reversed.append(struct.pack(f"<{count + 1}I", count, *relative) + bytes(padding))
        self._size += U32_SIZE
        return self._size

    def table(self, shape: Shape, values: Sequence[int]) -> int:
        """Add a table; `values` are in the order of the shape's fields, positions for offsets (0: absent)."""
        tail = self._size
        layout = shape.layout(tail % 8, tuple(map(operator.ne, values, shape.defaults)))
        packed = [
            tail + distance - values[index] if distance else values[index]
            for index, distance in layout.sources
        ]
        position = self._size = tail + layout.size
        self._align = max(self._align, layout.align)
        vtable = self._vtables.get(layout.vtable)
        if vtable is None:
            vtable = self._vtables[layout.vtable] = self._size = position + len(layout.vtable)
            self._reversed.append(layout.pack.pack(vtable - position, *packed))
            self._reversed.append(layout.vtable)
        else:
            self._reversed.append(layout.pack.pack(vtable - position, *packed))
        return position

    def finish(self, root: int) -> bytes:
        """Return the buffer, its root being the table at `root`."""
        padding = -(self._size + U32_SIZE) % self._align
        self._size += padding + U32_SIZE
        self._reversed.append(_U32.pack(self._size - root) + bytes(padding))
        return b"".join(reversed(self._reversed))
