"""Random layers for property tests: few names, so that entries meet, replace, link to and hide one another.

Concurrency: hypothesis strategies, no state.
"""

from __future__ import annotations

import tarfile
from typing import Any

from hypothesis import strategies as st

from tests.support.images import Entry
from tests.support.nasty import BIND_CAPABILITY, Named, xattr_records

_NAMES = ("a", "b", "c", "d")
_PLAIN_PART = st.sampled_from(_NAMES)
_PART = st.sampled_from((*_NAMES, *_NAMES, *_NAMES, *_NAMES, ".", "..", ""))
_WHITEOUT = st.sampled_from((".wh.a", ".wh.b", ".wh.c", ".wh.d", ".wh..wh..opq", ".wh..wh.plnk"))
_PREFIX = st.sampled_from(("", "", "", "./", "/", "../"))
_MODES = st.sampled_from((0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o000, 0o7777, 0o100644))
_OWNERS = st.sampled_from((0, 0, 7, 3_000_000_000, 0xFFFFFFFF))
_TIMES = st.sampled_from((0, -5, 1_000_000_000, 1_500_000_000, 253402300799))
_XATTRS = st.sampled_from(
    (
        {},
        {},
        {},
        {},
        {"user.x": b"1"},
        {"user.x": b""},
        {"user.y": b"\xff\x00"},
        {"trusted.t": b"1"},
        {"trusted.overlay.opaque": b"y"},
        {"security.capability": BIND_CAPABILITY},
        {"security.other": b"label", "user.z": b"2"},
        {"system.unknown": b"1", "nonsense": b"2"},
    )
)
_BAD_XATTRS = st.sampled_from(
    ({"security.capability": b"short"}, {"user.": b"1"}, {"user." + "n" * 256: b"1"})
)
_DEVICES = st.tuples(st.sampled_from((0, 1, 511, 5000)), st.sampled_from((0, 3, 70_000, (1 << 21) - 1)))


@st.composite
def paths(draw: st.DrawFn, *, plain: bool = False) -> str:
    """Return a relative or absolute path of up to four names, mostly clean."""
    part = _PLAIN_PART if plain else _PART
    parts = draw(st.lists(part, min_size=1, max_size=4))
    return ("" if plain else draw(_PREFIX)) + "/".join(parts)


@st.composite
def _named(draw: st.DrawFn, *, hostile: bool) -> Named:
    kind = draw(
        st.sampled_from(("reg", "reg", "dir", "dir", "dir", "symlink", "hardlink", "special", "whiteout"))
    )
    plain = draw(st.integers(0, 3)) > 0
    name = draw(paths(plain=plain))
    if kind == "whiteout":
        above = draw(st.sampled_from(("", f"{name}/")))
        return above + draw(_WHITEOUT), Entry(uid=draw(_OWNERS))
    attributes: dict[str, Any] = {
        "mode": draw(_MODES),
        "uid": draw(_OWNERS),
        "gid": draw(_OWNERS),
        "mtime": draw(_TIMES),
        "pax": xattr_records(draw(_BAD_XATTRS if hostile and draw(st.integers(0, 40)) == 0 else _XATTRS)),
    }
    match kind:
        case "dir":
            return name + "/", Entry(type=tarfile.DIRTYPE, **attributes)
        case "symlink":
            return name, Entry(type=tarfile.SYMTYPE, target=draw(paths()) or "a", **attributes)
        case "hardlink":
            target = draw(paths(plain=draw(st.booleans())))
            return name, Entry(type=tarfile.LNKTYPE, target=target, **attributes)
        case "special":
            major, minor = draw(_DEVICES)
            type_ = draw(st.sampled_from((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)))
            return name, Entry(type=type_, major=major, minor=minor, **attributes)
    return name, Entry(draw(st.binary(max_size=20)), **attributes)


def layers(*, hostile: bool = True) -> st.SearchStrategy[list[Named]]:
    """Return layers as lists of named entries in tar order; hostile ones hold what cannot be unpacked more often."""
    return st.lists(_named(hostile=hostile), max_size=14)
