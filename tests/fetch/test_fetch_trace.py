"""The recorded order of first use."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch import trace
from snapshotter.fetch.trace import Trace


def test_the_order_survives_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert trace.load(path, 100) == []
    trace.append(path, [7, 3])
    trace.append(path, [])
    trace.append(path, [99])
    assert trace.load(path, 100) == [7, 3, 99]
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_to_append_makes_no_file(tmp_path: Path) -> None:
    trace.append(tmp_path / "trace", [])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_file_cut_anywhere_gives_a_beginning_and_can_be_appended_to(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trace"
    trace.append(path, [7, 3, 99])
    path.write_bytes(path.read_bytes()[:-cut])
    rest = trace.load(path, 100)
    assert rest == [7, 3, 99][: len(rest)]
    trace.append(path, [50])
    assert trace.load(path, 100) == [*rest, 50]


def test_a_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"something else entirely")
    assert trace.load(path, 100) == []
    trace.append(path, [1])
    assert trace.load(path, 100) == [1]


@given(st.binary(max_size=200))
def test_whatever_is_in_the_file_only_spans_of_the_layer_come_out(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        path.write_bytes(trace.MAGIC + content)
        spans = trace.load(path, 10)
    assert len(spans) == len(set(spans))
    assert all(0 <= span < 10 for span in spans)


def test_first_uses_are_recorded_once() -> None:
    recorder = Trace([5, 2])
    assert [recorder.add(span) for span in (2, 4, 4, 0)] == [False, True, False, True]
    assert recorder.take_unsaved() == [4, 0]
    assert recorder.take_unsaved() == []
    assert recorder.order(7) == [5, 2, 4, 0, 1, 3, 6]
