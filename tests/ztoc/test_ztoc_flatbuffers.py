"""The checked reader: what points outside, what is absent, what claims more than there is."""

from __future__ import annotations

import struct

import pytest

from snapshotter.errors import InvalidZtoc
from snapshotter.ztoc.flatbuffers import Shape, Table, Writer


def buffer() -> bytearray:
    """Return a table of a number (slot 0), a string (1), strings (2) and a table (3)."""
    writer = Writer()
    inner = writer.table(Shape([(0, "i", 0)]), (9,))
    strings = writer.offsets([writer.string(b"one"), writer.string(b"")])
    shape = Shape([(0, "q", 0), (1, "o", 0), (2, "o", 0), (3, "o", 0)])
    return bytearray(writer.finish(writer.table(shape, (5, writer.string(b"text"), strings, inner))))


def root(data: bytes | bytearray) -> Table:
    return Table.root(bytes(data), "it")


def position(data: bytes | bytearray) -> int:
    return int(struct.unpack_from("<I", data)[0])


def vtable(data: bytes | bytearray) -> int:
    return position(data) - int(struct.unpack_from("<i", data, position(data))[0])


def field(data: bytes | bytearray, slot: int) -> int:
    return position(data) + int(struct.unpack_from("<H", data, vtable(data) + 4 + 2 * slot)[0])


def test_everything_is_read() -> None:
    table = root(buffer())
    assert (table.scalar(0, "q"), table.string(1), table.strings(2)) == (5, b"text", [b"one", b""])
    assert table.table(3, "inner").scalar(0, "i") == 9


def test_absent_fields_have_defaults() -> None:
    table = root(buffer())
    assert (table.scalar(4, "q", 3), table.string(4), table.strings(4)) == (3, b"", [])
    assert (table.byte_vector(4), table.offsets(4)) == ((0, 0), [])
    with pytest.raises(InvalidZtoc, match="it: has no child"):
        table.table(4, "child")


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\0"])
def test_too_short_for_a_root(data: bytes) -> None:
    with pytest.raises(InvalidZtoc, match="too few for a table"):
        root(data)


@pytest.mark.parametrize("target", [-3, -1, 0, 1 << 31, 0xFFFFFFFF])
def test_root_outside(target: int) -> None:
    data = buffer()
    struct.pack_into("<I", data, 0, target if target > 0 else len(data) + target)
    with pytest.raises(InvalidZtoc, match="it: lies outside the buffer"):
        root(data)


def test_vtable_outside() -> None:
    data = buffer()
    for offset in (-(1 << 31), position(data) + 1, position(data) - len(data) + 3, (1 << 31) - 1):
        struct.pack_into("<i", data, position(data), offset)
        with pytest.raises(InvalidZtoc, match="it: vtable lies outside the buffer"):
            root(data)


@pytest.mark.parametrize(("size", "table_size"), [(2, 40), (0, 40), (5, 40), (0xFFFE, 40), (12, 0xFFFF)])
def test_impossible_vtables(size: int, table_size: int) -> None:
    data = buffer()
    struct.pack_into("<HH", data, vtable(data), size, table_size)
    with pytest.raises(InvalidZtoc, match=f"impossible vtable of {size} bytes for a table of {table_size}"):
        root(data)


def test_field_outside_its_table() -> None:
    data = buffer()
    struct.pack_into("<H", data, vtable(data) + 4, 0xFFF0)
    with pytest.raises(InvalidZtoc, match="it: field 0 lies outside its table"):
        root(data).scalar(0, "q")


@pytest.mark.parametrize("target", [0xFFFFFFFF, 0x7FFFFFFF, -2])
def test_references_outside(target: int) -> None:
    data = buffer()
    for slot in (1, 2, 3):
        place = field(data, slot)
        struct.pack_into("<I", data, place, target if target > 0 else len(data) - place + target)
    table = root(data)
    for read in (table.string, table.strings, lambda slot: table.table(slot, "inner")):
        for slot in (1, 2, 3):
            with pytest.raises(InvalidZtoc, match="lies outside the buffer"):
                read(slot)


def test_lengths_beyond_the_end() -> None:
    data = buffer()
    for slot in (1, 2):
        place = field(data, slot)
        vector = place + int(struct.unpack_from("<I", data, place)[0])
        struct.pack_into("<I", data, vector, 0xFFFFFFFF)
        with pytest.raises(InvalidZtoc, match=f"it, field {slot}: ends outside the buffer"):
            root(data).strings(slot)


def test_strings_outside() -> None:
    data = buffer()
    place = field(data, 2)
    vector = place + int(struct.unpack_from("<I", data, place)[0])
    struct.pack_into("<I", data, vector + 4, 0x7FFFFFFF)
    with pytest.raises(InvalidZtoc, match="it, field 2: lies outside the buffer"):
        root(data).strings(2)


def test_equal_vtables_are_stored_once() -> None:
    shape = Shape([(0, "I", 0)])
    writer = Writer()
    writer.table(shape, (1,))
    data = writer.finish(writer.table(shape, (2,)))
    assert data.count(struct.pack("<HHH", 6, 8, 4)) == 1
