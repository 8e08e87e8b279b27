"""Layers that hold every awkward thing a real layer can hold, the same bytes at every run.

Two layers of one image: the upper one hides, replaces and recreates what the lower one has. With
`full=True` they are those whose merged tree is `tests/data/golden/nasty-tree-overlayfs.txt`, as containerd unpacks
it and overlayfs shows it; otherwise the few large files are small, and everything else is the same.

Names are given as in a tar: with `./`, `//`, leading slashes, `..`, and bytes that are not UTF-8.
"""

from __future__ import annotations

import random
import struct
import tarfile
from collections.abc import Iterable

from tests.support.images import Entry, directory, hardlink, symlink, tar

Named = tuple[str, Entry | bytes]

BIND_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""security.capability of a file that may bind low ports (revision 2, effective)."""

_SIZES = (1, 511, 512, 513, 1023, 4095, 4096, 4097, 131071, 131072, 131073)
_LARGE_SIZES = ((4 << 20) - 1, (4 << 20) + 1)
_ZEROS = 64 << 20
_RANDOM = 9 << 20
_SMALL = 70_001


def nasty_layers(*, full: bool = False) -> list[bytes]:
    """Return the uncompressed tars, bottom layer first. The full ones have 82 MB."""
    return [tar(lower_entries(full=full)), tar(upper_entries())]


def lower_entries(*, full: bool = False) -> list[Named]:
    """Return the entries of the bottom layer in tar order."""
    return [*_names(), *_links(), *_attributes(), *_long_and_foreign_names(), *_repeated(), *_bodies(full)]


def upper_entries() -> list[Named]:
    """Return the entries of the upper layer: whiteouts, opaque directories, replacements."""
    return [
        ("n/", directory()),
        ("n/.wh.whited", b""),
        ("n/.wh.wdir", b""),
        ("n/.wh.never-existed", b""),
        ("n/opq/", directory(0o750)),
        ("n/opq/.wh..wh..opq", b""),
        ("n/opq/new", b"new"),
        ("n/opq2/", directory()),
        ("n/opq2/newfirst", b"nf"),
        ("n/opq2/.wh..wh..opq", b""),  # the marker behind what it spares
        ("n/replace-file-by-dir/", directory(0o644)),
        ("n/replace-file-by-dir/y", b"y"),
        ("n/replace-dir-by-file", b"now a file"),
        ("n/.wh..wh.plnk/", directory(0o644)),  # leftovers of aufs
        ("n/.wh..wh.aufs", b""),
        ("n/wh-and-recreate", b"r"),
        ("n/.wh.plain", b""),
        ("n/plain", b"deleted and recreated in one layer\n"),
        ("n/hl-1", b"hard link broken by upper"),
    ]


def _names() -> list[Named]:
    return [
        ("./", directory()),
        ("./n/", directory()),
        ("./n/dotprefixed", b"dot\n"),
        ("n/plain", b"plain\n"),
        ("/n/absolute", b"abs\n"),
        ("n/a/../b/../norm", b"norm\n"),
        ("n//double//slash", b"dd\n"),
        ("n/noparent/x/y/z", b"implicit parents\n"),
        ("n/empty", b""),
    ]


def _links() -> list[Named]:
    return [
        ("n/hl-target", Entry(b"H" * 5000, mode=0o640)),
        ("n/hl-1", hardlink("n/hl-target")),
        ("n/hl-2", hardlink("./n/hl-target")),
        ("n/hl-3", hardlink("n/hl-1")),
        ("n/hl-abs", hardlink("/n/hl-target")),
        ("n/sl-rel", symlink("hl-target")),
        ("n/sl-abs", symlink("/n/plain")),
        ("n/sl-dangling", symlink("nowhere")),
        ("n/sl-escape", symlink("../../../../../../etc/shadow")),
        ("n/sl-loop", symlink("sl-loop")),
        ("n/hl-to-symlink", hardlink("n/sl-rel")),
        ("n/sl-long", symlink("t/" * 600 + "x")),
        ("n/dir-via-symlink/", directory()),
        ("n/sld", symlink("dir-via-symlink")),
        ("n/sld/through", b"written through a symlinked dir\n"),
    ]


def _attributes() -> list[Named]:
    return [
        ("n/suid", Entry(b"s", mode=0o4755)),
        ("n/sgid", Entry(b"g", mode=0o2755)),
        ("n/sticky/", directory(0o1777)),
        ("n/noperm", Entry(b"0", mode=0o000)),
        ("n/owned", Entry(b"o", uid=1234, gid=5678)),
        ("n/biguid", Entry(b"big", uid=3_000_000_000, gid=2_999_999_999)),
        ("n/chr", Entry(type=tarfile.CHRTYPE, mode=0o666, major=1, minor=3)),
        ("n/blk", Entry(type=tarfile.BLKTYPE, mode=0o660, major=7, minor=200)),
        ("n/bigdev", Entry(type=tarfile.CHRTYPE, mode=0o600, major=511, minor=70000)),
        ("n/fifo", Entry(type=tarfile.FIFOTYPE, mode=0o600)),
        ("n/caps", Entry(b"cap", mode=0o755, pax=xattr_records({"security.capability": BIND_CAPABILITY}))),
        (
            "n/xattr",
            Entry(
                b"xa",
                pax=xattr_records(
                    {"user.foo": b"bar", "user.empty": b"", "trusted.t": b"1", "user.big": b"x" * 3000}
                ),
            ),
        ),
        ("n/xattr-dir/", directory(pax=xattr_records({"user.d": b"dir"}))),
    ]


def _long_and_foreign_names() -> list[Named]:
    deep = "/".join(f"deep{level:03d}" + "d" * 80 for level in range(30))
    return [
        *((f"n/len/{'L' * length}", str(length).encode()) for length in (99, 100, 101, 155, 156, 255)),
        (f"n/{deep}/leaf", b"2.6 KB path"),
        ("n/é漢字😀", b"utf8"),
        ("n/" + b"latin1-\xe9\xff\xfe".decode("utf-8", "surrogateescape"), b"nonutf8"),
        ("n/new\nline\ttab", b"nl"),
        ("n/ sp ace ", b"sp"),
        ("n/back\\slash", b"bs"),
        ("n/-dash", b"-"),
    ]


def _repeated() -> list[Named]:
    return [
        ("n/dup", b"first version\n"),
        ("n/dup", b"second, longer version wins\n"),
        ("n/dup2dir", b"file first"),
        ("n/dup2dir/", directory()),
        ("n/dup2dir/inside", b"i"),
        ("n/typeflip/", directory()),
        ("n/typeflip", symlink("plain")),
        ("n/mtime-neg", Entry(mtime=-1000)),
        ("n/mtime-frac", Entry(pax={"mtime": "1700000000.123456789"})),
        ("n/mtime-2100", Entry(mtime=4102444800)),
        ("n/mtime-9999", Entry(mtime=253402300799)),
        ("n/whited", b"to be whited out"),
        ("n/wdir/", directory()),
        ("n/wdir/a", b"a"),
        ("n/opq/", directory()),
        ("n/opq/old1", b"1"),
        ("n/opq/sub/", directory()),
        ("n/opq/sub/old2", b"2"),
        ("n/opq2/", directory()),
        ("n/opq2/keepme-no", b"k"),
        ("n/replace-file-by-dir", b"f"),
        ("n/replace-dir-by-file/", directory(0o644)),
        ("n/replace-dir-by-file/x", b"x"),
    ]


def _bodies(full: bool) -> Iterable[Named]:
    """Contents at every interesting size; random ones do not compress, zeros compress a thousandfold."""
    source = random.Random(1)
    sizes = (*_SIZES, *_LARGE_SIZES) if full else _SIZES
    for size in sizes:
        yield f"n/size/{size}", source.randbytes(size)
    yield "n/zeros-64M", bytes(_ZEROS if full else _SMALL)
    yield "n/random-9M", source.randbytes(_RANDOM if full else _SMALL)


def xattr_records(attributes: dict[str, bytes]) -> dict[str, str]:
    """Return the PAX records that carry these extended attributes."""
    return {
        f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in attributes.items()
    }
