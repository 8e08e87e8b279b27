"""Handlers: what they answer, and that whatever goes wrong is an errno and not the end of the session."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from snapshotter import errors, messages
from snapshotter.fuse.counters import REQUEST_KINDS
from snapshotter.fuse.operations import LayerOperations, errno_of
from snapshotter.layer import wire
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.images import Entry, directory, hardlink, symlink, tar
from tests.support.keeping import keeping, shell
from tests.support.lazylayer import LazyLayer, make_layer, make_tar
from tests.support.nasty import xattr_records
from tests.support.serving import Serving

CONTEXT: Any = None
FOREVER = 1 << 32
NO_SUCH = 9999
PLAIN = tar(
    [
        ("d/", directory(0o2750, uid=3, gid=4)),
        ("d/file", Entry(b"F" * 5000, mode=0o4711, uid=5, gid=6, mtime=1_600_000_000)),
        ("d/twin", hardlink("d/file", mode=0o4711, uid=5, gid=6, mtime=1_600_000_000)),
        ("link", symlink("d/file")),
        ("null", Entry(type=b"3", mode=0o666, major=1, minor=3)),
    ]
)
LABELLED = tar(
    [("a", Entry(b"A", pax=xattr_records({"user.k": b"v\x00\xff"}))), ("b", b"B"), ("o/", directory())]
)
OPAQUE = tar([("o/", directory()), ("o/.wh..wh..opq", b"")])


def with_parts(root: Path, data: bytes, test: Callable[[Serving], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        with Serving(make_layer(root, data, **options), budget=0.2) as parts:
            async with background() as nursery:
                nursery.start_soon(parts.link.run)
                await test(parts)

    trio.run(main)


async def failure(attempt: Awaitable[object]) -> int:
    """Return the errno with which a handler answers."""
    with pytest.raises(pyfuse3.FUSEError) as info:
        await attempt
    return int(info.value.errno)


# --- answers


def test_attributes(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        entry = await parts.operations.getattr(parts.ino("d/file"), CONTEXT)
        assert (entry.st_mode, entry.st_nlink) == (stat.S_IFREG | 0o4711, 2)
        assert (entry.st_uid, entry.st_gid) == (5, 6)
        assert (entry.st_size, entry.st_blocks, entry.st_blksize) == (5000, 16, 4096)
        assert entry.st_mtime_ns == entry.st_ctime_ns == entry.st_atime_ns == 1_600_000_000 * 10**9
        assert entry.entry_timeout == entry.attr_timeout == FOREVER
        device = await parts.operations.getattr(parts.ino("null"), CONTEXT)
        assert device.st_rdev == os.makedev(1, 3)
        root = await parts.operations.getattr(1, CONTEXT)
        assert root.st_mode == stat.S_IFDIR | 0o755

    with_parts(tmp_path, PLAIN, test)


def test_lookups(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        operations = parts.operations
        found = await operations.lookup(parts.ino("d"), b"twin", CONTEXT)
        assert found.st_ino == parts.ino("d/file")
        absent = await operations.lookup(parts.ino("d"), b"absent", CONTEXT)
        assert (absent.st_ino, absent.entry_timeout) == (0, FOREVER)  # remembered as absent
        in_a_file = await operations.lookup(parts.ino("d/file"), b"x", CONTEXT)
        assert in_a_file.st_ino == 0

    with_parts(tmp_path, PLAIN, test)


def test_links_files_and_numbers(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        operations = parts.operations
        assert await operations.readlink(parts.ino("link"), CONTEXT) == b"d/file"
        opened = await operations.open(parts.ino("d/file"), os.O_RDONLY, CONTEXT)
        assert opened.fh == parts.ino("d/file")
        assert opened.keep_cache
        assert bytes(await operations.read(opened.fh, 4990, 4096)) == b"F" * 10
        assert await operations.read(opened.fh, 5000, 4096) == b""
        assert await operations.opendir(parts.ino("d"), CONTEXT) == parts.ino("d")
        numbers = await operations.statfs(CONTEXT)
        assert numbers.f_blocks * 4096 >= parts.tree.uncompressed_size
        assert (numbers.f_bfree, numbers.f_bavail, numbers.f_ffree) == (0, 0, 0)
        assert (numbers.f_files, numbers.f_namemax) == (5, 255)
        assert parts.count("read_bytes") == 10

    with_parts(tmp_path, PLAIN, test)


def test_a_layer_without_attributes_says_so_once(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        ino = parts.ino("d/file")
        assert await failure(parts.operations.getxattr(ino, b"user.k", CONTEXT)) == errno.ENOSYS
        assert await parts.operations.listxattr(ino, CONTEXT) == ()

    with_parts(tmp_path, PLAIN, test)


def test_a_layer_with_attributes_answers_for_each(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        operations, a, b = parts.operations, parts.ino("a"), parts.ino("b")
        assert await operations.getxattr(a, b"user.k", CONTEXT) == b"v\x00\xff"
        assert await operations.listxattr(a, CONTEXT) == (b"user.k",)
        assert await failure(operations.getxattr(b, b"user.k", CONTEXT)) == errno.ENODATA
        assert await operations.listxattr(b, CONTEXT) == ()

    with_parts(tmp_path, LABELLED, test)


def test_an_opaque_directory_is_asked_about(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        value = await parts.operations.getxattr(parts.ino("o"), b"trusted.overlay.opaque", CONTEXT)
        assert value == b"y"

    with_parts(tmp_path, OPAQUE, test)


def test_flush_is_not_wanted_and_forgetting_costs_nothing(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        assert await failure(parts.operations.flush(parts.ino("d/file"))) == errno.ENOSYS
        await parts.operations.forget([(1, 1), (NO_SUCH, 7)])
        await parts.operations.release(NO_SUCH)
        await parts.operations.releasedir(NO_SUCH)
        assert parts.count("requests_forget") == 2

    with_parts(tmp_path, PLAIN, test)


# --- failures

HANDLERS: dict[str, Callable[[LayerOperations, int], Awaitable[object]]] = {
    "getattr": lambda ops, ino: ops.getattr(ino, CONTEXT),
    "readlink": lambda ops, ino: ops.readlink(ino, CONTEXT),
    "read": lambda ops, ino: ops.read(ino, 0, 100),
    "listxattr": lambda ops, ino: ops.listxattr(ino, CONTEXT),
    "getxattr": lambda ops, ino: ops.getxattr(ino, b"user.k", CONTEXT),
    "readdir": lambda ops, ino: ops.readdir(ino, 0, CONTEXT),
}


@pytest.mark.parametrize("kind", HANDLERS)
def test_an_unknown_inode_is_stale(tmp_path: Path, kind: str, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("request failed")

    async def test(parts: Serving) -> None:
        for number in (0, NO_SUCH, 1 << 40):
            assert await failure(HANDLERS[kind](parts.operations, number)) == errno.ESTALE
        assert parts.count(f"requests_{kind}") == parts.count(f"failures_{kind}") == 3
        assert parts.operations.in_flight == 0

    with_parts(tmp_path, LABELLED, test)


def test_a_span_that_cannot_be_had_is_eio_and_the_session_goes_on(
    tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("read gave up waiting")
    expected_logs.allow("request failed")

    async def test(parts: Serving) -> None:
        ino = parts.ino("d/file")
        assert await failure(parts.operations.read(ino, 0, 100)) == errno.EIO
        for span in range(parts.tree.span_count):
            parts.inflate(span)
        assert bytes(await parts.operations.read(ino, 0, 3)) == b"FFF"

    with_parts(tmp_path, PLAIN, test, inflated=False)


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (errors.HeaderMismatch("x"), errno.EIO),
        (errors.SpanDigestMismatch("x"), errno.EIO),
        (errors.RegistryTimeout("x"), errno.EIO),
        (KeyError(7), errno.ESTALE),
        (MemoryError(), errno.ENOMEM),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
        (IndexError("a bug"), errno.EIO),
        (AssertionError(), errno.EIO),
        (errors.NoIndex("not of this world"), errno.EIO),
    ],
)
def test_whatever_is_raised_becomes_an_errno(
    tmp_path: Path,
    raised: Exception,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    expected_logs: ExpectedLogs,
) -> None:
    expected_logs.allow("request failed")
    assert errno_of(raised) == number

    async def test(parts: Serving) -> None:
        async def read(*_arguments: object) -> bytes:
            raise raised

        monkeypatch.setattr(parts.contents, "read", read)
        assert await failure(parts.operations.read(parts.ino("d/file"), 0, 1)) == number
        assert parts.operations.in_flight == 0

    with_parts(tmp_path, PLAIN, test)


def test_a_cancelled_request_is_no_longer_in_flight(tmp_path: Path) -> None:
    async def test(parts: Serving) -> None:
        with trio.move_on_after(0.05) as scope:
            await parts.operations.read(parts.ino("d/file"), 0, 1)
        assert scope.cancelled_caught
        assert parts.operations.in_flight == 0
        assert parts.count("failures_read") == 0

    with_parts(tmp_path, PLAIN, test, inflated=False)


def test_every_handler_is_counted() -> None:
    """By a kind that has counters; one that pyfuse3 knows and we do not answer is its own ENOSYS."""
    own = {name for name in vars(LayerOperations) if not name.startswith("_")}
    handlers = {name for name in own if callable(getattr(LayerOperations, name))}
    assert handlers <= set(REQUEST_KINDS)
    for name in handlers - {"forget"}:
        assert hasattr(getattr(LayerOperations, name), "__wrapped__"), name


# --- through the kernel


@pytest.fixture
def tampered(workdir: Path) -> LazyLayer:
    """A layer in whose data one header is another: the owner of `b` is changed, with a right checksum."""
    layer = make_layer(workdir, make_tar({"a": b"A" * 3000, "b": b"B" * 3000, "c": b"C" * 3000}))
    data = bytearray(layer.paths.data.read_bytes())
    header = data.index(b"b\0" * 1 + bytes(98))
    data[header + 108 : header + 116] = b"0000007\0"
    data[header + 148 : header + 156] = b"        "
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    layer.paths.data.write_bytes(data)
    return layer


class SureGate:
    """A fetcher that is asked to look at spans again and finds nothing wrong with them."""

    def connect(self, layer: Digest) -> int | None:
        """Return a socket to it."""
        near, far = messages.pair()
        threading.Thread(target=self._answer, args=[far], daemon=True).start()
        return near.detach()

    def _answer(self, server: socket.socket) -> None:
        with server:
            while data := server.recv(wire.PACKET_SIZE):
                match wire.decode(data):
                    case wire.Doubt(span):
                        server.send(wire.encode(wire.Ready(span, span + 1)))


@pytest.mark.usefixtures("fuse")
def test_a_damaged_file_is_eio_and_the_others_are_read(workdir: Path, tampered: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir, gate=SureGate()) as kept:
            target = workdir / "m"
            await kept.keeper.mount(tampered.spec(1, target))
            said = await shell(f"for name in a b c b a; do cat {target}/$name 2>&1; echo; done")
            lines = said.splitlines()
            assert [line[:4] for line in lines] == ["AAAA", "cat:", "", "CCCC", "cat:", "", "AAAA"]
            assert "Input/output error" in lines[1]
            assert len(lines[0]) == 3000
            counters = kept.keeper.counters(1)
            assert counters["header_mismatches"] >= 2
            assert counters["failures_read"] >= 2
            assert counters["adoptions"] == 1

    trio.run(main)


@pytest.mark.usefixtures("fuse")
def test_a_setuid_bit_that_the_tar_does_not_have_gives_nothing_to_run(workdir: Path) -> None:
    """The zTOC claims it; not one byte of such a file goes out, so there is nothing to execute."""
    script = b"#!/bin/sh\nid -u\n"
    layer = make_layer(
        workdir, tar([("tool", Entry(script, mode=0o4755)), ("other", Entry(script, mode=0o755))])
    )
    data = bytearray(layer.paths.data.read_bytes())
    header = data.index(b"tool\0")
    data[header + 100 : header + 108] = b"0000755\0"
    data[header + 148 : header + 156] = b"        "
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    layer.paths.data.write_bytes(data)

    async def main() -> None:
        async with keeping(workdir, gate=SureGate()) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            assert await shell(f"{target}/other") == "0\n"
            assert await shell(f"{target}/tool 2>&1 || echo refused") != "0\n"
            assert "Input/output error" in await shell(f"cat {target}/tool 2>&1 || true")
            assert kept.keeper.counters(1)["header_mismatches"] >= 1

    trio.run(main)
