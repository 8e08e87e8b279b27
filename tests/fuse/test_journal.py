"""The memory of unanswered requests: what is in it survives, what is not a request is nothing."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snapshotter.fuse import kernel
from snapshotter.fuse.journal import SIZE, SLOT_SIZE, SLOTS, Journal
from tests.support.process import open_descriptors


def lookup(unique: int, name: bytes = b"name\0") -> bytes:
    size = kernel.IN_HEADER.size + len(name)
    return kernel.IN_HEADER.pack(size, kernel.LOOKUP, unique, 1, 0, 0, 0, 0, 0) + name


@pytest.fixture
def fd() -> Iterator[int]:
    made = Journal.create("journal")
    yield made
    os.close(made)


@contextmanager
def device(*packets: bytes) -> Iterator[int]:
    """A descriptor that gives one packet per read, as /dev/fuse does."""
    out, into = os.pipe2(os.O_DIRECT)
    for packet in packets:
        os.write(into, packet)
    try:
        yield out
    finally:
        os.close(out)
        os.close(into)


def test_what_was_read_is_seen_by_whoever_has_the_memory(fd: int) -> None:
    journal, other = Journal(fd), Journal(fd)
    with device(lookup(7), lookup(8)) as source:
        assert journal.read(source, 0) == kernel.Request(kernel.LOOKUP, 7, 1)
        journal.read(source, 5)
    assert [(slot, request.unique) for slot, request in other.unanswered()] == [(0, 7), (5, 8)]
    assert bytes(other.packet(5)) == lookup(8)
    journal.clear(0)
    assert [slot for slot, _request in other.unanswered()] == [5]
    free = other.free_slots()
    assert len(free) == SLOTS - 1
    assert free[-1] == 0
    journal.close()
    other.close()


def test_nobody_can_change_its_size(fd: int) -> None:
    """The keeper maps it, and a layer server has it: a shorter file would be the keeper's end."""
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_what_is_no_request_is_cleared(fd: int) -> None:
    os.pwrite(fd, (12).to_bytes(4, "little"), 0)
    os.pwrite(fd, b"\xff" * SLOT_SIZE, SLOT_SIZE)
    journal = Journal(fd)
    assert len(journal.packet(1)) == SLOT_SIZE  # never more than the slot
    found = journal.unanswered()
    assert [slot for slot, _request in found] == [1]
    assert len(journal.free_slots()) == SLOTS - 1
    journal.close()


def test_a_device_that_fails_leaves_the_slot_free(fd: int) -> None:
    journal = Journal(fd)
    with open("/proc/self/mem", "rb") as source, pytest.raises(OSError, match="FUSE device") as info:
        journal.read(source.fileno(), 3)
    assert info.value.errno == errno.EIO
    assert journal.unanswered() == []
    journal.close()


def test_a_signal_ends_a_read(fd: int) -> None:
    journal = Journal(fd)
    former = signal.signal(signal.SIGALRM, lambda *_ignored: None)
    main, over = threading.main_thread().ident, threading.Event()
    assert main is not None

    def interrupt() -> None:
        while not over.wait(0.05):  # the first may come before the read
            signal.pthread_kill(main, signal.SIGALRM)

    timer = threading.Thread(target=interrupt)
    timer.start()
    try:
        with device() as source, pytest.raises(InterruptedError):
            journal.read(source, 0)
    finally:
        over.set()
        timer.join()
        signal.signal(signal.SIGALRM, former)
        journal.close()


def test_private_memory_needs_no_descriptor() -> None:
    before = open_descriptors()
    journal = Journal()
    with device(lookup(1)) as source:
        journal.read(source, 0)
    assert len(journal.unanswered()) == 1
    journal.close()
    assert open_descriptors() == before
