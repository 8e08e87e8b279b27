"""The bytes of files: at every border, while spans come and go, and never a wrong one."""

from __future__ import annotations

import errno
import os
import random
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from snapshotter.errors import HeaderMismatch
from snapshotter.layer.spans import SpanState
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.images import Entry, hardlink, tar
from tests.support.lazylayer import LazyLayer, make_layer
from tests.support.serving import Fetcher, Serving

SPAN = 1 << 14
_RANDOM = random.Random(7)
SIZES = (0, 1, 511, 512, 513, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN, 100_001)
FILES = {f"f{size}": _RANDOM.randbytes(size) for size in SIZES}
TAR = tar({**FILES, "twin": hardlink("f513"), "long/" + "n" * 200: Entry(b"behind a PAX header")})


@pytest.fixture
def layer(tmp_path: Path) -> LazyLayer:
    return make_layer(tmp_path, TAR, span_size=SPAN)


@pytest.fixture
def missing(tmp_path: Path) -> LazyLayer:
    return make_layer(tmp_path / "missing", TAR, span_size=SPAN, inflated=False)


def with_parts(
    layer: LazyLayer,
    test: Callable[[Serving], Awaitable[None]],
    *,
    budget: float = 10.0,
    data_fd: int | None = None,
) -> None:
    async def main() -> None:
        with Serving(layer, budget=budget, data_fd=data_fd) as parts:
            async with background() as nursery:
                nursery.start_soon(parts.link.run)
                with trio.fail_after(60):
                    await test(parts)

    trio.run(main)


async def confirmed(parts: Serving, path: str, mend: Callable[[], object] = bool) -> bytes:
    """Read a file beside a fetcher that looks at what is in doubt, and mends it."""
    fetcher = Fetcher(parts)
    try:
        async with background() as nursery:
            nursery.start_soon(fetcher.confirm, mend)
            return await parts.read(path)
    finally:
        fetcher.close()
    raise AssertionError("unreachable")


# --- where the bytes are


def test_every_file_reads_as_it_is(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        assert parts.tree.span_count > 10
        for name, content in FILES.items():
            assert await parts.read(name) == content
        assert await parts.read("twin") == FILES["f513"]
        assert await parts.read("long/" + "n" * 200) == b"behind a PAX header"

    with_parts(layer, test)


def test_ranges_at_every_border(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        name, content = "f100001", FILES["f100001"]
        start = parts.tree.row(parts.ino(name)).data_offset
        borders = {parts.tree.span(i).uncompressed_start - start for i in parts.spans_of(name)} | {
            0,
            len(content),
        }
        for border in borders:
            for offset in (border - 1, border, border + 1):
                for size in (0, 1, 2, SPAN, 2 * SPAN + 1, len(content)):
                    if offset >= 0:
                        assert await parts.read(name, offset, size) == content[offset : offset + size]

    with_parts(layer, test)


@pytest.mark.parametrize("offset", [100_001, 100_002, 1 << 40, (1 << 63) - 1])
def test_behind_the_end_there_is_nothing(layer: LazyLayer, offset: int) -> None:
    async def test(parts: Serving) -> None:
        assert await parts.read("f100001", offset, 1 << 20) == b""
        assert parts.count("spans_local") == 0  # nothing was looked at

    with_parts(layer, test)


def test_an_empty_file_costs_nothing(missing: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        assert await parts.read("f0") == b""

    with_parts(missing, test)


def test_only_the_spans_of_a_range_are_asked_for(missing: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with background() as nursery:
            nursery.start_soon(fetcher.serve)
            first = parts.tree.row(parts.ino("f100001"))
            content = await parts.read("f100001", 60_000, 10)
            assert content == FILES["f100001"][60_000:60_010]
            wanted = {
                *parts.tree.spans_for(first.header_start, first.data_offset),
                *parts.tree.spans_for(first.data_offset + 60_000, first.data_offset + 60_010),
            }
            there = {i for i in range(parts.tree.span_count) if parts.view.state(i) is SpanState.INFLATED}
            assert there == wanted
        fetcher.close()

    with_parts(missing, test)


def test_what_is_missing_is_waited_for_by_any_number_of_readers(missing: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        got: list[bool] = []

        async def read(name: str) -> None:
            got.append(await parts.read(name) == FILES[name])

        async with background() as beside:
            beside.start_soon(fetcher.serve)
            async with trio.open_nursery() as nursery:
                for name in FILES:
                    for _ in range(3):
                        nursery.start_soon(read, name)
        assert got == [True] * 3 * len(FILES)
        fetcher.close()

    with_parts(missing, test)


# --- eviction


def test_a_span_that_is_evicted_while_it_is_read_is_asked_for_again(
    layer: LazyLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the state and the read of the bytes; the generation tells."""

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        name = "f100001"
        await parts.read(name, 0, 1)  # its header is checked
        evictions = list(parts.spans_of(name))[:3]
        original = parts.contents._pread

        async def pread(buffer: bytearray, start: int) -> int:
            if evictions:
                span = evictions.pop()
                parts.evict(span)
                if len(evictions) % 2:
                    parts.inflate(span)  # even when it is back by the time of the second look
            return await original(buffer, start)

        monkeypatch.setattr(parts.contents, "_pread", pread)
        async with background() as nursery:
            nursery.start_soon(fetcher.serve)
            assert await parts.read(name) == FILES[name]
        assert evictions == []
        fetcher.close()

    with_parts(layer, test)


def test_a_span_that_is_evicted_again_and_again_is_an_error_in_the_end(
    layer: LazyLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        (span,) = parts.spans_of("f1")
        original = parts.contents._pread

        async def pread(buffer: bytearray, start: int) -> int:
            parts.evict(span)
            parts.inflate(span)
            return await original(buffer, start)

        monkeypatch.setattr(parts.contents, "_pread", pread)
        with pytest.raises(OSError, match="evicted 8 times") as info:
            await parts.read("f1")
        assert info.value.errno == errno.EIO
        fetcher.close()

    with_parts(layer, test)


def test_random_reads_beside_random_evictions_are_never_wrong(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        source = random.Random(3)
        stop = trio.Event()
        right: list[str] = []

        async def evict() -> None:
            while not stop.is_set():
                span = source.randrange(parts.tree.span_count)
                if parts.view.state(span) is SpanState.INFLATED:
                    parts.evict(span)
                await trio.lowlevel.checkpoint()

        async def read() -> None:
            for _ in range(60):
                name = source.choice(list(FILES))
                offset, size = source.randrange(len(FILES[name]) + 1), source.randrange(50_000)
                try:
                    got = await parts.read(name, offset, size)
                except OSError as error:  # on a slow disk one read may lose to eight evictions
                    if "evicted 8 times" not in str(error):
                        raise
                    continue
                assert got == FILES[name][offset : offset + size]
                right.append(name)

        async with background() as beside:
            beside.start_soon(fetcher.serve)
            beside.start_soon(evict)
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(read)
            stop.set()
        assert right
        fetcher.close()

    with_parts(layer, test)


# --- what the disk says


def test_a_file_system_that_cannot_tell_what_is_cached(layer: LazyLayer) -> None:
    """tmpfs among others refuses RWF_NOWAIT: the read is done in a thread."""
    memory = os.memfd_create("data")
    os.write(memory, layer.paths.data.read_bytes())
    with pytest.raises(OSError, match="not supported"):
        os.preadv(memory, [bytearray(1)], 0, os.RWF_NOWAIT)

    async def test(parts: Serving) -> None:
        for name, content in FILES.items():
            assert await parts.read(name) == content

    with_parts(layer, test, data_fd=memory)


def test_bytes_that_are_not_in_the_page_cache(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        for name in ("f1", "f100001"):
            os.fsync(parts.data)
            os.posix_fadvise(parts.data, 0, 0, os.POSIX_FADV_DONTNEED)
            assert await parts.read(name) == FILES[name]

    with_parts(layer, test)


def test_a_data_file_that_stays_too_short_is_an_error(layer: LazyLayer, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("data file is short")

    async def test(parts: Serving) -> None:
        os.ftruncate(parts.data, 3000)
        with pytest.raises(OSError, match="short or evicted") as info:
            await confirmed(parts, "f100001")
        assert info.value.errno == errno.EIO
        assert await parts.read("f1") == FILES["f1"]

    with_parts(layer, test)


def test_a_data_file_that_was_cut_off_is_mended_and_read_again(
    layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("data file is short")

    async def test(parts: Serving) -> None:
        os.ftruncate(parts.data, 3000)
        content = await confirmed(parts, "f100001", lambda: os.pwrite(parts.data, layer.tar, 0))
        assert content == FILES["f100001"]

    with_parts(layer, test)


def test_a_damaged_header_is_doubted_before_it_is_refused(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        start, end = header_of(parts, "f1")
        os.pwrite(parts.data, bytes(end - start), start)
        content = await confirmed(parts, "f1", lambda: os.pwrite(parts.data, layer.tar, 0))
        assert content == FILES["f1"]
        assert parts.count("header_mismatches") == 0

    with_parts(layer, test)


def test_what_the_disk_does_not_take_is_read_from_memory(missing: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with background() as nursery:
            nursery.start_soon(fetcher.lend)
            for name in ("f100001", "f1", "f100001"):
                assert await parts.read(name) == FILES[name]
            for span in list(parts.spans_of("f100001"))[::2]:
                parts.inflate(span)
            for offset in range(0, 100001, 10_000):
                content = await parts.read("f100001", offset, 10_000)
                assert content == FILES["f100001"][offset : offset + 10_000]
        fetcher.close()

    with_parts(missing, test)


def test_a_read_error_of_the_disk_is_passed_on(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        with pytest.raises(OSError, match="Is a directory"):
            await parts.read("f1")

    with_parts(layer, test, data_fd=os.open("/", os.O_RDONLY))


def test_a_span_that_never_comes_is_an_error_in_time(missing: LazyLayer, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("read gave up waiting")

    async def test(parts: Serving) -> None:
        with pytest.raises(OSError, match="did not arrive in time"):
            await parts.read("f1")

    with_parts(missing, test, budget=0.2)


# --- headers


def header_of(parts: Serving, path: str) -> tuple[int, int]:
    node = parts.tree.row(parts.ino(path))
    return node.header_start, node.data_offset


def rewritten(header: bytes, **changes: int) -> bytes:
    """Return a tar header with other fields and a right checksum."""
    info = tarfile.TarInfo.frombuf(header[-512:], "utf-8", "surrogateescape")
    for name, value in changes.items():
        setattr(info, name, value)
    return header[:-512] + info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("changes", [{"mode": 0o4755}, {"uid": 5}, {"size": 512}, {"mtime": 1}])
def test_a_header_that_is_not_the_ztocs_is_refused_and_counted(
    layer: LazyLayer, changes: dict[str, int]
) -> None:
    """Its checksum is right: somebody built the zTOC from another layer."""

    async def test(parts: Serving) -> None:
        start, end = header_of(parts, "f513")
        header = os.pread(parts.data, end - start, start)
        os.pwrite(parts.data, rewritten(header, **changes), start)
        for _ in range(2):
            with pytest.raises(HeaderMismatch, match="f513"):
                await confirmed(parts, "f513")
        assert parts.count("header_mismatches") == 2
        assert await parts.read("f512") == FILES["f512"]
        os.pwrite(parts.data, header, start)
        assert await parts.read("f513") == FILES["f513"]  # a refusal is not for ever

    with_parts(layer, test)


def test_a_header_that_is_none_is_refused(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        start, end = header_of(parts, "f1")
        os.pwrite(parts.data, bytes(end - start), start)
        with pytest.raises(HeaderMismatch):
            await confirmed(parts, "f1")

    with_parts(layer, test)


def test_the_header_of_a_hard_link_is_that_of_its_file(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        assert parts.ino("twin") == parts.ino("f513")
        assert await parts.read("twin", 500) == FILES["f513"][500:]

    with_parts(layer, test)


def test_a_header_is_read_once(layer: LazyLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []

    async def test(parts: Serving) -> None:
        original = parts.contents._check_header

        async def check(ino: int, node: object) -> None:
            checks.append(ino)
            await original(ino, node)  # type: ignore[arg-type]

        monkeypatch.setattr(parts.contents, "_check_header", check)
        for _ in range(3):
            await parts.read("f513", 0, 10)
            await parts.read("twin", 100, 10)
        assert checks == [parts.ino("f513")]

    with_parts(layer, test)
