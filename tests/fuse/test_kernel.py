"""The words of the kernel protocol that we speak ourselves."""

from __future__ import annotations

import struct

import pytest

from snapshotter.fuse import kernel

INIT = kernel.Init(minor=45, max_readahead=131072, flags=0x5FD_73FFFFFB | kernel.Flag.HAS_RESEND)


def test_a_synthetic_init_is_read_back_as_it_was() -> None:
    request = kernel.synthetic_init(7, INIT)
    assert len(request) == kernel.IN_HEADER.size + kernel.INIT_IN_SIZE
    assert struct.unpack_from("<I", request)[0] == len(request)
    assert kernel.parse_init(request) == (7, INIT)


def test_the_text_form_fits_a_descriptor_name_and_is_read_back() -> None:
    text = INIT.to_text()
    assert kernel.Init.from_text(text) == INIT
    assert len(text) < 64
    assert not set(text) & set(": /\n")


@pytest.mark.parametrize("text", ["", "45", "45-1", "45-x-1", "45-1-zz"])
def test_a_damaged_text_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        kernel.Init.from_text(text)


def test_our_answer_takes_only_what_is_offered() -> None:
    poor = INIT._replace(flags=kernel.Flag.ASYNC_READ | kernel.Flag.INIT_EXT)
    reply = kernel.init_reply(9, poor)
    length, error, unique = kernel.OUT_HEADER.unpack_from(reply)
    assert (length, error, unique) == (len(reply), 0, 9)
    assert len(reply) == kernel.OUT_HEADER.size + kernel.INIT_OUT_SIZE
    major, minor, _readahead, flags = struct.unpack_from("<IIII", reply, kernel.OUT_HEADER.size)
    flags2 = struct.unpack_from("<I", reply, kernel.OUT_HEADER.size + 32)[0]
    assert (major, minor) == (7, 45)
    assert flags | flags2 << 32 == poor.flags


def test_our_answer_asks_for_resend_and_parallel_directories() -> None:
    reply = kernel.init_reply(9, INIT)
    flags = struct.unpack_from("<I", reply, kernel.OUT_HEADER.size + 12)[0]
    flags2 = struct.unpack_from("<I", reply, kernel.OUT_HEADER.size + 32)[0]
    assert (flags | flags2 << 32) == INIT.flags & kernel.WANTED
    assert (flags | flags2 << 32) & kernel.Flag.HAS_RESEND
    assert flags & kernel.Flag.PARALLEL_DIROPS


def test_an_old_kernel_is_refused_with_both_versions() -> None:
    old = INIT._replace(minor=31)
    with pytest.raises(ValueError, match=r"7\.31; 7\.36 or newer"):
        kernel.parse_init(kernel.synthetic_init(1, old))


def test_another_request_is_no_init() -> None:
    lookup = kernel.IN_HEADER.pack(kernel.IN_HEADER.size, kernel.LOOKUP, 1, 1, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="opcode 1"):
        kernel.parse_init(lookup)


@pytest.mark.parametrize("length", range(kernel.IN_HEADER.size))
def test_a_short_request_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="shorter than its header"):
        kernel.parse_request(bytes(length))


def test_a_resend_notice_is_a_notification_without_body() -> None:
    assert kernel.OUT_HEADER.unpack(kernel.resend_notice()) == (16, kernel.NOTIFY_RESEND, 0)


def test_statfs_tells_blocks_in_use_and_none_free() -> None:
    reply = kernel.statfs_reply(3, blocks=10, files=4)
    blocks, free, available, files, files_free = struct.unpack_from("<5Q", reply, 16)
    assert (blocks, free, available, files, files_free) == (10, 0, 0, 4, 0)
    assert struct.unpack_from("<III", reply, 56) == (4096, 255, 4096)
    assert len(reply) == 16 + 80


def test_attributes_of_the_root() -> None:
    reply = kernel.attr_reply(
        3, mode=0o40755, nlink=5, uid=1, gid=2, size=4096, mtime_ns=1_500_000_000, valid=99
    )
    assert len(reply) == 16 + 16 + 88
    assert struct.unpack_from("<Q", reply, 16)[0] == 99
    ino, size, blocks, _atime, mtime = struct.unpack_from("<5Q", reply, 32)
    assert (ino, size, blocks, mtime) == (1, 4096, 8, 1)
    assert struct.unpack_from("<I", reply, 32 + 52)[0] == 500_000_000
    assert struct.unpack_from("<4I", reply, 32 + 60) == (0o40755, 5, 1, 2)
