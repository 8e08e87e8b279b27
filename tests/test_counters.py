"""Counters in shared memory."""

from __future__ import annotations

import os

import pytest

from snapshotter.counters import CounterPage

NAMES = ("a", "b", "c")


def test_counts_outlive_the_process_that_counted() -> None:
    fd = CounterPage.create("test", NAMES)
    pid = os.fork()
    if pid == 0:
        page = CounterPage(fd, NAMES, writable=True)
        page.add("a")
        page.add_at(page.index("b"), 1 << 40)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    page = CounterPage(fd, NAMES, writable=False)
    assert page.snapshot() == {"a": 1, "b": 1 << 40, "c": 0}
    page.close()
    os.close(fd)


def test_a_reader_cannot_count() -> None:
    fd = CounterPage.create("test", NAMES)
    page = CounterPage(fd, NAMES, writable=False)
    with pytest.raises(TypeError):
        page.add("a")
    page.close()
    os.close(fd)


def test_a_gauge_goes_down_again() -> None:
    fd = CounterPage.create("test", NAMES)
    page = CounterPage(fd, NAMES, writable=True)
    page.add("c", 5)
    page.add("c", -2)
    page.set("a", 9)
    assert page.snapshot() == {"a": 9, "b": 0, "c": 3}
    assert page.words[page.index("c")] == 3
    page.close()
    os.close(fd)


def test_an_unknown_name_is_an_error() -> None:
    fd = CounterPage.create("test", NAMES)
    page = CounterPage(fd, NAMES, writable=True)
    with pytest.raises(KeyError):
        page.add("d")
    page.close()
    os.close(fd)


def test_a_page_without_names_is_empty() -> None:
    fd = CounterPage.create("test", ())
    page = CounterPage(fd, (), writable=False)
    assert page.snapshot() == {}
    page.close()
    os.close(fd)
