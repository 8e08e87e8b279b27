"""The file list of a serialized zTOC -> FileEntry values, at about 3 µs each.

A layer may have hundreds of thousands of files, so this is the one place of the format where time
per element matters. Tables that share a vtable have their numbers at the same places: for each
vtable a plan is made once, and then one unpacking per table reads all fields. Nothing read is
trusted: InvalidZtoc names the file by its position in the list.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from typing import NamedTuple

from snapshotter.errors import InvalidZtoc
from snapshotter.ztoc.flatbuffers import U32_SIZE, Table, vtable_position
from snapshotter.ztoc.model import KINDS, FileEntry

_FORMATS = "IIqqIqIIIIIqqI"
"""Struct letters of fields 0..13 of a file; `I` is a reference, but for uid and gid (6, 7)."""

_REFERENCES = (0, 1, 4, 8, 9, 10, 13)
_NUMBERS = (2, 3, 5, 6, 7, 11, 12)

_KINDS = {kind.encode(): kind for kind in KINDS}

_SHARING = 4
"""How much larger all files together may be than the buffer that they are read from.

Nothing forbids a writer to point many times at one string, but we copy it each time, and without a
bound a small buffer could make us copy terabytes. The reference writer shares nothing (factor 1).
"""

_i32 = struct.Struct("<i").unpack_from

_Pax = tuple[tuple[bytes, bytes], ...]

_PaxPlan = tuple[int, int, int]
"""For the PAX records that share a vtable: size of the table, and like in _Plan the key's and value's place."""


def read_entries(data: bytes, toc: Table) -> list[FileEntry]:
    """Return the files of a TOC table in the order of its list. Raises InvalidZtoc."""
    positions = toc.offsets(0)
    if len(set(positions)) != len(positions):
        raise InvalidZtoc("TOC: two files share a table")
    entries: list[FileEntry] = []
    try:
        _append_entries(data, positions, entries)
    except (struct.error, IndexError):
        raise InvalidZtoc(f"file {len(entries)}: points outside the buffer") from None
    except KeyError as error:
        raise InvalidZtoc(f"file {len(entries)}: unknown type {error.args[0]!r}") from None
    return entries


class _Plan(NamedTuple):
    """How to read the tables that share a vtable.

    `references` and `numbers` pick those fields in slot order out of the unpacked values with a 0
    behind them (for absent fields). `places` are, for each reference, the distance from the start of
    the table to what it is relative to, plus the size of the length that stands before what it
    refers to.
    """

    size: int
    unpack: Callable[[bytes, int], tuple[int, ...]]
    references: Callable[[tuple[int, ...]], tuple[int, ...]]
    numbers: Callable[[tuple[int, ...]], tuple[int, ...]]
    places: tuple[int, ...]


def _make_plan(table: Table) -> _Plan:
    size, offsets = table.fields
    offsets = (*offsets[: len(_FORMATS)], *[0] * (len(_FORMATS) - len(offsets)))
    layout = "<"
    order: dict[int, int] = {}
    for offset, slot in sorted((offset, slot) for slot, offset in enumerate(offsets) if offset):
        gap = offset - struct.calcsize(layout)
        if gap < 0:
            raise InvalidZtoc(f"{table.what}: field {slot} overlaps another")
        layout += f"{gap}x{_FORMATS[slot]}"
        order[slot] = len(order)
    if struct.calcsize(layout) > size:
        raise InvalidZtoc(f"{table.what}: a field lies outside its table")
    if not order.keys() >= set(_REFERENCES):
        raise InvalidZtoc(f"{table.what}: lacks a text field, even an empty one")
    return _Plan(
        size=size,
        unpack=struct.Struct(layout).unpack_from,
        references=operator.itemgetter(*[order[slot] for slot in _REFERENCES]),
        numbers=operator.itemgetter(*[order.get(slot, len(order)) for slot in _NUMBERS]),
        places=tuple(offsets[slot] + U32_SIZE for slot in _REFERENCES),
    )


def _make_pax_plan(table: Table) -> _PaxPlan:
    size, offsets = table.fields
    if len(offsets) < 2 or not all(0 < offset <= size - U32_SIZE for offset in offsets[:2]):
        raise InvalidZtoc(f"{table.what}: lacks a key or value")
    return size, offsets[0] + U32_SIZE, offsets[1] + U32_SIZE


def _append_entries(data: bytes, positions: list[int], entries: list[FileEntry]) -> None:
    """Read one entry per position: the loop that has to be fast, hence the plain locals and the words.

    A read outside the buffer surfaces as struct.error or IndexError, an unknown type as KeyError.
    """
    size = len(data)
    budget = size * _SHARING
    new = tuple.__new__
    words = _words(data)
    plans: dict[int, _Plan] = {}
    pax_plans: dict[int, _PaxPlan] = {}
    times: dict[bytes, str] = {}
    for table in positions:
        plan = plans.get(table - _i32(data, table)[0])
        if plan is None:
            what = f"file {len(entries)}"
            plan = plans[vtable_position(data, table, what)] = _make_plan(Table(data, table, what))
        table_size, unpack, references, numbers, places = plan
        values = (*unpack(data, table), 0)
        to_name, to_kind, to_link, to_uname, to_gname, to_time, to_pax = references(values)
        offset, length, mode, uid, gid, major, minor = numbers(values)
        at_name, at_kind, at_link, at_uname, at_gname, at_time, at_pax = places
        at_name += table + to_name
        at_kind += table + to_kind
        at_link += table + to_link
        at_uname += table + to_uname
        at_gname += table + to_gname
        at_time += table + to_time
        at_pax += table + to_pax
        if (at_name | at_kind | at_link | at_uname | at_gname | at_time | at_pax) & 3:
            raise InvalidZtoc(f"file {len(entries)}: a text is not at a multiple of 4")
        name = data[at_name : (end_name := at_name + words[(at_name >> 2) - 1])]
        kind = data[at_kind : (end_kind := at_kind + words[(at_kind >> 2) - 1])]
        link = data[at_link : (end_link := at_link + words[(at_link >> 2) - 1])]
        uname = data[at_uname : (end_uname := at_uname + words[(at_uname >> 2) - 1])]
        gname = data[at_gname : (end_gname := at_gname + words[(at_gname >> 2) - 1])]
        time = data[at_time : (end_time := at_time + words[(at_time >> 2) - 1])]
        if max(end_name, end_kind, end_link, end_uname, end_gname, end_time) > size:
            raise IndexError
        budget -= table_size + len(name) + len(kind) + len(link) + len(uname) + len(gname) + len(time)
        if budget < 0:
            raise InvalidZtoc(f"file {len(entries)}: the texts so far are larger than the buffer")
        mod_time = times.get(time)
        if mod_time is None:
            mod_time = times[time] = time.decode("utf-8", "surrogateescape")
        pax: _Pax = ()
        if count := words[(at_pax >> 2) - 1]:
            pax, budget = _read_pax(data, words, at_pax, count, budget, pax_plans, len(entries))
        fields = (name, _KINDS[kind], offset, length, link, mode, uid, gid, uname, gname, mod_time)
        entries.append(new(FileEntry, (*fields, major, minor, pax)))


def _words(data: bytes) -> memoryview:
    """Return the whole words of the buffer: an index costs half of an unpacking."""
    return memoryview(data)[: len(data) & ~3].cast("I")


def _read_pax(
    data: bytes,
    words: memoryview,
    start: int,
    count: int,
    budget: int,
    plans: dict[int, _PaxPlan],
    number: int,
) -> tuple[_Pax, int]:
    """Return the `count` PAX records in the vector at `start`, of the file `number`, and what they leave of the budget.

    Raises IndexError, struct.error, InvalidZtoc.
    """
    records = []
    first = start >> 2
    for index in range(first, first + count):
        table = (index << 2) + words[index]
        plan = plans.get(table - _i32(data, table)[0])
        if plan is None:
            what = f"file {number}, PAX records"
            plan = plans[vtable_position(data, table, what)] = _make_pax_plan(Table(data, table, what))
        size, key, value = plan
        key += table
        value += table
        if (key | value) & 3:
            raise InvalidZtoc(f"file {number}, PAX records: a reference is not at a multiple of 4")
        key += words[(key >> 2) - 1]
        value += words[(value >> 2) - 1]
        if (key | value) & 3:
            raise InvalidZtoc(f"file {number}, PAX records: a text is not at a multiple of 4")
        key_end, value_end = key + words[(key >> 2) - 1], value + words[(value >> 2) - 1]
        if key_end > len(data) or value_end > len(data):
            raise IndexError
        budget -= size + key_end - key + value_end - value
        if budget < 0:
            raise InvalidZtoc(f"file {number}, PAX records: the texts so far are larger than the buffer")
        records.append((data[key:key_end], data[value:value_end]))
    return tuple(records), budget
