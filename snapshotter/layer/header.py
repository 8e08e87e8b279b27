"""The run-time check of one file: is the tar header in front of its data the one that the zTOC promised?

A span's digest proves that its bytes are those the builder of the zTOC saw, not that the TOC describes them. So
before the first byte of a file is served, its tar header is parsed and compared with the entry. A server has
no zTOC at hand, hence the tree keeps a fingerprint of each entry, and the header's is compared with it.

Pure functions; nothing here reads a file.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Final

from snapshotter.errors import HeaderMismatch, InvalidTar, UnsupportedLayer
from snapshotter.layer.scratch import clean
from snapshotter.ztoc.model import KINDS, FileEntry, mod_time_ns, xattrs
from snapshotter.ztoc.tar import parse_header

FINGERPRINT_SIZE: Final = 16
NO_FINGERPRINT: Final = bytes(FINGERPRINT_SIZE)

_NUMBERS: Final = struct.Struct("<q4Qqq5I")
_MASK_64: Final = (1 << 64) - 1
_LENGTHS: Final = struct.Struct("<II")

_KIND_NUMBERS: Final = {kind: number for number, kind in enumerate(KINDS)}


def fingerprint(entry: FileEntry, moment: int | None = None) -> bytes:
    """Return 16 bytes that stand for what the header of `entry` must say.

    Covered are the cleaned name, kind, size, modification time (the moment, not its text, which depends on the time
    zone of the builder), link name, permission bits, owner, device numbers and extended attributes in any order.
    `moment` is `mod_time_ns` of the entry for whoever knows it already.
    """
    name, kind, _, size, linkname, mode, uid, gid, _, _, mod_time, devmajor, devminor, pax = entry
    attributes = sorted(dict(xattrs(entry)).items()) if pax else ()
    name = clean(name)
    seconds, nanoseconds = divmod(mod_time_ns(mod_time) if moment is None else moment, 1_000_000_000)
    body = _NUMBERS.pack(
        seconds,
        nanoseconds,
        size & _MASK_64,
        uid,
        gid,
        devmajor,
        devminor,
        mode & 0o7777,
        _KIND_NUMBERS[kind],
        len(name),
        len(linkname),
        len(attributes),
    )
    body += name + linkname
    for key, value in attributes:
        body += _LENGTHS.pack(len(key), len(value)) + key + value
    return blake2b(body, digest_size=FINGERPRINT_SIZE).digest()


def check(region: bytes, expected: bytes) -> None:
    """Compare the header `region` in front of a file's data with the fingerprint of its entry.

    Raises HeaderMismatch when it is no tar header, does not fill the region, or says something else.
    """
    try:
        entry = parse_header(region)
    except (InvalidTar, UnsupportedLayer) as error:
        raise HeaderMismatch(f"no readable tar header in front of the data: {error}") from error
    if fingerprint(entry) != expected:
        raise HeaderMismatch("the tar header in front of the data is not the one that the zTOC describes")
