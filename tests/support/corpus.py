"""Layers of every compressor and of every quirk of a container, and what the reference made of them.

`tests/data/corpus/*.tar.gz` are one tar of real packages (h11 and MarkupSafe, with their licences), as real
compressors packed it; they are kept because compressors change. Everything else is put together here, byte by byte.

`digests.tsv` holds facts: the version of the reference that made a zTOC, the layer, and the digests of both; what a
reference is known to get wrong is not in it. `python -m bench.identity --record` wrote it.

Concurrency: plain functions and values.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from snapshotter.ztoc.model import Algorithm
from tests.support import deflate, raw_tar
from tests.support.images import (
    Entry,
    Image,
    ImageBuilder,
    LayerBlob,
    directory,
    hardlink,
    sha256,
    symlink,
    tar,
)
from tests.support.nasty import Named, lower_entries, upper_entries

DIRECTORY = Path(__file__).parents[1] / "data/corpus"
TABLE = DIRECTORY / "digests.tsv"
VERSIONS = ("0.4.1", "0.15.0")
"""Of the references that were asked."""

SPAN_SIZE = 16 << 10
"""Of the small layers, so that they have several spans."""

LARGE_SPAN_SIZE = 4 << 20

CONVERTED = "converted image"
"""In the table: the digest of an image of all layers of one span size, and the root of what was made of it."""

SEVERAL_MEMBERS = ("0.4.",)
"""Wrong in these: the search for checkpoints stops behind the first gzip member."""

EMPTY_START = ("",)
"""Wrong in all: a stream that begins without output gets empty spans, which their own daemons refuse."""

_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_PLAIN = "application/vnd.oci.image.layer.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
_HUGE_MATCHES = 65_000
_HUGE_BLOCKS = 258
_HUGE_CRC = 0x14E535C2
_MANY = 100_000
_TIMES = (
    "-1.5",
    "-0.000000001",
    "0.5",
    "1700000000.123456789123",
    "-62135596800.25",
    "+12.0",
    "253402300799.9",
)


TarFormat = Literal[0, 1, 2]


@dataclass(frozen=True, slots=True)
class Case:
    """A layer: `chunks` returns its blob in pieces."""

    name: str
    chunks: Callable[[], Iterable[bytes]]
    media_type: str = _GZIP
    span_size: int = SPAN_SIZE
    wrong_in: tuple[str, ...] = ()
    """How the versions of the reference begin that get it wrong; then the oracle says what is right."""

    @property
    def algorithm(self) -> Algorithm:
        """As the zTOC says it."""
        return Algorithm.GZIP if self.media_type == _GZIP else Algorithm.UNCOMPRESSED

    @property
    def large(self) -> bool:
        """Whether it is better not held in memory twice."""
        return self.span_size == LARGE_SPAN_SIZE


class Fact(NamedTuple):
    """What the reference of that version made of a layer; see CONVERTED for the one that is no layer."""

    version: str
    name: str
    layer: str
    ztoc: str


def facts() -> tuple[Fact, ...]:
    """Return the table."""
    return tuple(Fact(*line.split("\t")) for line in TABLE.read_text().splitlines())


def build_tool(version: str) -> str:
    """Return how the reference of a version calls itself in zTOCs."""
    return "AWS SOCI CLI v0.1" if version.startswith("0.4.") else "AWS SOCI CLI v0.2"


def trusted(case: Case, version: str) -> bool:
    """Tell whether the reference of a version is right about a layer."""
    return not version.startswith(case.wrong_in)


def image(layout: Path, cases: Sequence[Case], tag: str) -> Image:
    """Write an image that has these layers in this order."""
    return ImageBuilder(layout).add(*map(_layer, cases)).build(tag)


def _layer(case: Case) -> LayerBlob:
    blob = b"".join(case.chunks())
    with gzip.open(io.BytesIO(blob)) if case.algorithm is Algorithm.GZIP else io.BytesIO(blob) as unpacked:
        diff_id = hashlib.file_digest(unpacked, "sha256")
    return LayerBlob(case.media_type, sha256(blob), f"sha256:{diff_id.hexdigest()}", len(blob), blob)


@cache
def real_tar() -> bytes:
    """Return the tar of real packages."""
    return gzip.decompress((DIRECTORY / "gzip-9.tar.gz").read_bytes())


def _blob(path: Path) -> list[bytes]:
    return [path.read_bytes()]


def _kept() -> list[Case]:
    several = {"bgzip": SEVERAL_MEMBERS}
    paths = sorted(DIRECTORY.glob("*.tar.gz"))
    names = {path: path.name.removesuffix(".tar.gz") for path in paths}
    return [Case(names[path], partial(_blob, path), wrong_in=several.get(names[path], ())) for path in paths]


def _stored(data: bytes, size: int = 0xFFFF, **fields: bytes) -> list[bytes]:
    return [deflate.gzipped(data, deflate.stored(data, size), **fields)]


def _fixed(data: bytes, size: int) -> list[bytes]:
    return [deflate.gzipped(data, deflate.fixed(data, size))]


def _shapes() -> list[Case]:
    """The streams: what a gzip file can be made of."""
    return [
        Case("stored blocks", lambda: _stored(real_tar())),
        Case("stored blocks, tiny", lambda: _stored(real_tar(), 100)),
        Case("fixed code", lambda: _fixed(real_tar(), 4000)),
        Case("fixed code, tiny blocks", lambda: _fixed(real_tar(), 7)),
        Case("fixed code, one block", lambda: _fixed(real_tar(), 1 << 30)),
        Case("own code, long repeats", _repeats),
        Case("empty blocks first", _empty_blocks, wrong_in=EMPTY_START),
        Case("header: extra field", lambda: _stored(real_tar(), extra=b"ab\x04\0wxyz")),
        Case("header: name", lambda: _stored(real_tar(), name=b"layer.tar")),
        Case("header: everything", lambda: _stored(real_tar(), extra=b"E" * 300, name=b"n", comment=b"c")),
        Case("members", lambda: _members([40_000, 40_000]), wrong_in=SEVERAL_MEMBERS),
        Case(
            "members, empty ones among them", lambda: _members([0, 0, 10_000, 0, 1, 0]), wrong_in=EMPTY_START
        ),
        Case("member per 1500 bytes", lambda: _members([1500] * 143), wrong_in=SEVERAL_MEMBERS),
    ]


def _repeats() -> list[bytes]:
    block, size = deflate.zeros(100)
    count = 8
    head = raw_tar.header(name=b"zeros", size=size * count)
    rest = bytes(-(size * count) % raw_tar.BLOCK) + raw_tar.END
    blocks = deflate.stored(head) + block * count + deflate.fixed(rest, 500)
    return [deflate.gzipped(head + bytes(size * count) + rest, blocks)]


def _empty_blocks() -> list[bytes]:
    data = real_tar()
    empty = deflate.stored(b"\0")[:1] + b"\0\0\xff\xff"
    half = len(data) // 2
    blocks = empty * 3 + deflate.stored(data[:half]) + empty * 3 + deflate.fixed(data[half:], 3000) + empty
    return [deflate.gzipped(data, blocks)]


def _members(sizes: Sequence[int]) -> list[bytes]:
    """Members of these sizes and one of the rest, each made in another way."""
    data, out = real_tar(), []
    for number, size in enumerate((*sizes, len(data))):
        piece, data = data[:size], data[size:]
        blocks = deflate.fixed(piece, 900) if number % 2 else deflate.stored(piece, 20_000)
        out.append(deflate.gzipped(piece, blocks, extra=b"x" * (number % 3)))
    return out


def _archives() -> list[Case]:
    """The tars: names, times and numbers in every form, packed or plain."""
    return [
        Case("names: ustar", lambda: _stored(_formatted(tarfile.USTAR_FORMAT))),
        Case("names: GNU", lambda: _stored(_formatted(tarfile.GNU_FORMAT))),
        Case("names: PAX", lambda: _stored(_formatted(tarfile.PAX_FORMAT))),
        Case("names: none in UTF-8", lambda: _stored(_foreign())),
        Case("times: negative and fractions", lambda: _stored(_times())),
        Case("numbers: base 256, octal with blanks", lambda: _stored(_numbers())),
        Case("every kind of entry", lambda: _stored(tar(lower_entries()))),
        Case("every kind of entry, plain", lambda: [tar(lower_entries())], _PLAIN),
        Case("whiteouts", lambda: _stored(tar(upper_entries()))),
        Case("whiteouts, Docker's plain type", lambda: [tar(upper_entries())], _DOCKER),
        Case("no entry", lambda: _stored(raw_tar.END)),
        Case("no end, no padding", lambda: _stored(raw_tar.entry(b"abc")[:-509])),
        Case("data behind the end", lambda: _stored(tar({"a": b"a"}) + b"behind" * 1000)),
        Case("100,000 files", lambda: _stored(_many()), span_size=LARGE_SPAN_SIZE),
        Case("100,000 files, plain", lambda: [_many()], _PLAIN, span_size=LARGE_SPAN_SIZE),
        Case("more than 4 GiB", _huge, span_size=LARGE_SPAN_SIZE),
    ]


def _formatted(form: TarFormat) -> bytes:
    """The same entries, their long names and large numbers as the format has them."""
    names = ["d/" + "n" * length for length in (97, 98)] + ["d/" * 40 + "p" * 60, "d/" * 70 + "q" * 90]
    links = ["t" * 99]
    if form != tarfile.USTAR_FORMAT:
        names += ["d/" + "n" * length for length in (99, 150)] + ["r/" * 300 + "r"]
        links += ["t" * 101, "t/" * 500]
    entries: list[Named] = [("d/", directory()), *((name, name.encode()) for name in names)]
    entries += [(f"l{number}", symlink(target)) for number, target in enumerate(links)]
    entries += [("h", hardlink(names[0])), ("o", Entry(b"o", uid=2_000_000, gid=1_000_000, mtime=1 << 32))]
    return _archive(entries, form)


def _archive(entries: Iterable[Named], form: TarFormat) -> bytes:
    """As `tar` does, in any format."""
    out = b""
    for name, value in entries:
        entry = value if isinstance(value, Entry) else Entry(value)
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.linkname, info.size = entry.type, entry.mode, entry.target, len(entry.data)
        info.uid, info.gid, info.mtime, info.uname, info.gname = (
            entry.uid,
            entry.gid,
            entry.mtime,
            "user",
            "group",
        )
        out += info.tobuf(form, "utf-8", "surrogateescape") + raw_tar.padded(entry.data)
    return out + raw_tar.END


def _foreign() -> bytes:
    names = [
        b"latin1-\xe9\xff\xfe",
        b"\x80",
        b"cut-\xe2\x82",
        b"surrogate-\xed\xa0\x80",
        b"new\nline",
        b'q"\\<&>',
    ]
    entries = [raw_tar.entry(b"x", name=name, linkname=b"", uname=b"\xff", gname=b"\xfe") for name in names]
    entries += [raw_tar.header(name=b"l", flag=b"2", linkname=names[0], size=0)]
    entries += [
        raw_tar.pax((b"path", name * 40), (b"\xffkey", b"\xfevalue")) + raw_tar.entry(b"y")
        for name in names[:3]
    ]
    return b"".join(entries) + raw_tar.END


def _times() -> bytes:
    entries = [
        raw_tar.pax((b"mtime", text.encode())) + raw_tar.entry(b"t", name=text.encode()) for text in _TIMES
    ]
    negative = [
        raw_tar.entry(b"n", name=b"%d" % -time, mtime=_base_256(time)) for time in (-1, -86400, -(1 << 40))
    ]
    return b"".join([*entries, *negative]) + raw_tar.END


def _base_256(value: int, size: int = 12) -> bytes:
    return bytes([0x80 if value >= 0 else 0xFF]) + (value & ((1 << 8 * size - 8) - 1)).to_bytes(
        size - 1, "big"
    )


def _numbers() -> bytes:
    large = [
        raw_tar.entry(b"n", uid=_base_256(3_000_000_000, 8), gid=_base_256(-1, 8), mtime=_base_256(1 << 35))
    ]
    blanks = [
        raw_tar.entry(b"n", mode=b"  644 \0 ", uid=b" 1750 \0", gid=b"0000001\0", mtime=b"14371573400 ")
    ]
    bits = [raw_tar.entry(b"n", mode=b"0100755\0"), raw_tar.entry(b"n", magic=raw_tar.V7, uname=b"u")]
    device = [
        raw_tar.header(name=b"c", flag=b"3", devmajor=b"7777777\0", devminor=_base_256(70_000, 8), size=0)
    ]
    return b"".join([*large, *blanks, *bits, *device]) + raw_tar.END


@cache
def _many() -> bytes:
    """100,000 empty files in directories of a thousand, one in ten of them with something in it."""
    out = []
    for number in range(_MANY):
        name = b"srv/%02d/%05d" % (number // 1000, number)
        out.append(
            raw_tar.entry(
                b"%d\n" % number if number % 10 == 0 else b"", name=name, mtime=1_700_000_000 + number
            )
        )
    return b"".join(out) + raw_tar.END


def _huge() -> Iterable[bytes]:
    """A file of more than 4 GiB, and one behind it."""
    block, size = deflate.zeros(_HUGE_MATCHES)
    whole = size * _HUGE_BLOCKS
    head = raw_tar.header(name=b"huge", size=whole)
    rest = bytes(-whole % raw_tar.BLOCK) + raw_tar.entry(b"behind", name=b"small") + raw_tar.END
    blocks = deflate.stored(head), block * _HUGE_BLOCKS, deflate.stored(rest)
    return [deflate.member(b"".join(blocks), _HUGE_CRC, len(head) + whole + len(rest))]


CASES: tuple[Case, ...] = (*_kept(), *_shapes(), *_archives())
"""Every layer; the names are unique."""
