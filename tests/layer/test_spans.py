"""Span states: legal moves, what survives which end, and a reader that looks while an owner moves."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer.spans import HEADER_SIZE, RECORD, SpanFile, SpanState, SpanView
from snapshotter.units import Digest

MISSING, FETCHED, INFLATED, SUSPECT = SpanState
BOOT, OTHER_BOOT = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
LAYER, OTHER_LAYER = Digest("sha256:" + "ab" * 32), Digest("sha256:" + "cd" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spans"


def opened(path: Path, count: int = 4, *, boot_id: str = BOOT, digest: Digest = LAYER) -> SpanFile:
    return SpanFile.create_or_open(path, count, boot_id=boot_id, digest=digest)


@contextmanager
def view_of(path: Path) -> Iterator[SpanView]:
    with open(path, "rb") as file:
        view = SpanView(file.fileno())
    with closing(view):
        yield view


def crash(file: SpanFile) -> None:
    """Let go of the file as a killed process does: nothing is marked, the lock is gone."""
    file._unmap()
    os.close(file._fd)


def bring(file: SpanFile, span: int, state: SpanState) -> None:
    """Bring a MISSING span to another state."""
    if state in (FETCHED, INFLATED):
        file.set_fetched(span)
    if state is INFLATED:
        file.set_inflated(span, 77)


def test_a_new_file_has_nothing(path: Path) -> None:
    with closing(opened(path)) as file, view_of(path) as view:
        assert file.states() == view.states() == bytes(4)
        assert view.span_count == 4
        assert view.counts() == {MISSING: 4, FETCHED: 0, INFLATED: 0, SUSPECT: 0}
        assert (view.header_fetched, view.complete, view.verified) == (False, False, False)
        assert (view.fetched_bytes, view.inflated_bytes) == (0, 0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == HEADER_SIZE + 4 * RECORD.size


def test_the_life_of_a_span_as_a_reader_sees_it(path: Path) -> None:
    with closing(opened(path)) as file, view_of(path) as view:
        file.set_fetched(2)
        assert (view.state(2), view.generation(2)) == (FETCHED, 0)
        file.set_inflated(2, 0xFFFF_FFFF_FFFF_FFFF)
        assert (view.state(2), view.word(2)) == (INFLATED, 2)
        assert file.checksum(2) == 0xFFFF_FFFF_FFFF_FFFF
        before = view.word(2)
        file.evict_data(2)
        assert (view.state(2), view.generation(2), file.checksum(2)) == (FETCHED, 1, 0)
        file.set_inflated(2, 5)
        assert view.word(2) != before  # inflated again, but a read that spans the eviction notices
        file.set_missing(2)
        assert (view.state(2), view.generation(2)) == (MISSING, 2)
        assert view.states() == bytes(4)


def test_records_are_as_documented(path: Path) -> None:
    with closing(opened(path)) as file:
        bring(file, 1, INFLATED)
        file.evict_data(1)
        file.set_inflated(1, 1 << 63)
    assert RECORD.unpack_from(path.read_bytes(), HEADER_SIZE + RECORD.size) == (INFLATED, 1, 1 << 63)


@pytest.mark.parametrize(
    ("state", "move"),
    [
        (MISSING, lambda file: file.set_inflated(0, 1)),
        (MISSING, lambda file: file.evict_data(0)),
        (FETCHED, lambda file: file.set_fetched(0)),
        (FETCHED, lambda file: file.evict_data(0)),
        (INFLATED, lambda file: file.set_fetched(0)),
        (INFLATED, lambda file: file.set_inflated(0, 1)),
        (SUSPECT, lambda file: file.evict_data(0)),
    ],
)
def test_illegal_moves_raise_and_change_nothing(path: Path, state: SpanState, move: object) -> None:
    assert callable(move)
    file = opened(path)
    if state is SUSPECT:
        bring(file, 0, INFLATED)
        crash(file)
        file = opened(path)
    else:
        bring(file, 0, state)
    with closing(file):
        word = file.word(0)
        with pytest.raises(RuntimeError, match=f"illegal move of span 0: {state.name}"):
            move(file)
        assert file.word(0) == word


@pytest.mark.parametrize("span", [-1, 4])
def test_spans_that_are_not_there(path: Path, span: int) -> None:
    with closing(opened(path)) as file, view_of(path) as view:
        for use in (
            file.state,
            file.checksum,
            file.set_fetched,
            file.set_missing,
            view.word,
            view.generation,
        ):
            with pytest.raises(IndexError, match=f"span {span} of 4"):
                use(span)


def fill(path: Path) -> SpanFile:
    file = opened(path)
    for span, state in enumerate((MISSING, FETCHED, INFLATED, INFLATED)):
        bring(file, span, state)
    file.set_header_fetched(True)
    file.set_complete(True)
    file.set_verified(True)
    file.set_fetched_bytes(300)
    file.set_inflated_bytes(200)
    return file


def test_a_clean_end_keeps_everything(path: Path) -> None:
    fill(path).close()
    with closing(opened(path)) as file:
        assert list(file.states()) == [MISSING, FETCHED, INFLATED, INFLATED]
        assert (file.header_fetched, file.complete, file.verified) == (True, True, True)
        assert (file.fetched_bytes, file.inflated_bytes) == (300, 200)
        assert file.generation(2) == 0


def test_the_time_to_the_first_verification_is_told_and_kept(path: Path) -> None:
    with closing(opened(path)) as file:
        assert file.offline_after is None
    with closing(opened(path)) as file:
        file.set_verified(True)
        first = file.offline_after
        assert first is not None
        assert 0 < first < 60
        file.set_complete(False)
        file.set_verified(True)
        assert file.offline_after == first


def test_the_time_is_not_told_where_the_host_went_down_in_between(path: Path) -> None:
    opened(path).close()
    with closing(opened(path, boot_id=OTHER_BOOT)) as file:
        file.set_verified(True)
        assert file.offline_after is None


@pytest.mark.parametrize("how", ["crash", "reboot", "crash and reboot"])
def test_after_any_other_end_everything_stored_is_suspect(path: Path, how: str) -> None:
    file = fill(path)
    if "crash" in how:
        crash(file)
    else:
        file.close()
    with (
        view_of(path) as view,
        closing(opened(path, boot_id=OTHER_BOOT if "reboot" in how else BOOT)) as file,
    ):
        assert list(view.states()) == [MISSING, SUSPECT, SUSPECT, SUSPECT]
        assert view.generation(2) == 1
        assert (file.header_fetched, file.complete, file.verified) == (True, False, False)
        assert (file.checksum(1), file.checksum(2)) == (0, 77)
        file.set_inflated(2, file.checksum(2))
        file.set_fetched(1)
        file.set_missing(3)
        assert list(view.states()) == [MISSING, FETCHED, INFLATED, MISSING]


def test_a_second_crash_suspects_again(path: Path) -> None:
    crash(fill(path))
    crash(opened(path))
    with closing(opened(path)) as file:
        assert list(file.states()) == [MISSING, SUSPECT, SUSPECT, SUSPECT]
        file.set_inflated(3, 1)
        assert file.generation(3) == 2


@pytest.mark.parametrize("change", [{"digest": OTHER_LAYER}, {"count": 6}, {"count": 2}])
def test_a_file_of_something_else_starts_afresh_in_place(path: Path, change: dict[str, object]) -> None:
    fill(path).close()
    inode, size = path.stat().st_ino, path.stat().st_size
    with view_of(path) as view, closing(opened(path, **change)) as file:  # type: ignore[arg-type]
        assert set(file.states()) == {MISSING}
        assert (file.header_fetched, file.complete, file.fetched_bytes) == (False, False, 0)
        assert view.state(1) is MISSING
        assert view.generation(1) == 1
    assert path.stat().st_ino == inode
    assert path.stat().st_size >= size


@pytest.mark.parametrize("content", [b"", b"SPANSTAT", b"x" * 5000, bytes(1 << 16)], ids=len)
def test_a_file_of_garbage_starts_afresh(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(InvalidLayerFile, match="made again"):
        SpanView(file.fileno())
    with closing(opened(path)) as mended:
        assert mended.states() == bytes(4)


def test_a_truncated_file_is_refused_by_readers(path: Path) -> None:
    fill(path).close()
    for size in (0, 1, HEADER_SIZE - 1, HEADER_SIZE, path.stat().st_size - 1):
        os.truncate(path, size)
        with open(path, "rb") as file, pytest.raises(InvalidLayerFile):
            SpanView(file.fileno())
        fill(path).close()


def test_damaged_states(path: Path) -> None:
    fill(path).close()
    with open(path, "r+b") as file:
        file.seek(HEADER_SIZE + 2 * RECORD.size)
        file.write(b"\x09")
    with view_of(path) as view:
        with pytest.raises(InvalidLayerFile, match="span 2 has the unknown state 9"):
            view.state(2)
        assert view.counts() == {MISSING: 2, FETCHED: 1, INFLATED: 1, SUSPECT: 0}
    with closing(opened(path, boot_id=OTHER_BOOT)) as mended:
        assert list(mended.states()) == [MISSING, SUSPECT, MISSING, SUSPECT]


def test_one_writer_at_a_time(path: Path) -> None:
    with closing(opened(path)), pytest.raises(BlockingIOError):
        opened(path)
    opened(path).close()


def test_giving_up_a_span_takes_completeness_back(path: Path) -> None:
    with closing(fill(path)) as file:
        file.set_missing(0)
        assert (file.complete, file.verified) == (True, True)  # it was missing before
        file.evict_data(2)
        assert (file.complete, file.verified) == (True, True)
        file.set_missing(1)
        assert (file.complete, file.verified) == (False, False)


def test_a_view_cannot_write(path: Path) -> None:
    opened(path).close()
    with view_of(path) as view, pytest.raises(TypeError, match=r"read-only|readonly"):
        view._words[HEADER_SIZE // 8] = 1


def test_a_layer_without_spans(path: Path) -> None:
    with closing(opened(path, 0)), view_of(path) as view:
        assert view.states() == b""
        assert sum(view.counts().values()) == 0


class ReaderBesideWriter(RuleBasedStateMachine):
    """A reader that finds the same INFLATED word before and after its pread has read whole bytes.

    The data of span 0 is a byte: its version while it is whole, 0 while it is absent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = os.memfd_create("unused")
        self.fd = os.memfd_create("spans")
        self.file = SpanFile.create_or_open(Path(f"/proc/self/fd/{self.fd}"), 1, boot_id=BOOT, digest=LAYER)
        self.view = SpanView(self.fd)
        self.data = mmap.mmap(-1, 1)
        self.version = 0
        self.first_word: int | None = None
        self.seen: int | None = None

    @rule(steps=st.integers(1, 6))
    def owner_moves(self, steps: int) -> None:
        for _ in range(steps):
            match self.file.state(0):
                case SpanState.MISSING:
                    self.file.set_fetched(0)
                case SpanState.FETCHED:
                    self.version = self.version % 255 + 1
                    self.data[0] = self.version
                    self.file.set_inflated(0, self.version)
                case SpanState.INFLATED:
                    self.file.evict_data(0)
                    self.data[0] = 0

    @rule()
    def reader_begins(self) -> None:
        self.first_word, self.seen = self.view.word(0), None

    @rule()
    def reader_reads(self) -> None:
        if self.first_word is not None:
            self.seen = self.data[0]

    @rule()
    def reader_ends(self) -> None:
        if (
            self.seen is not None
            and self.view.word(0) == self.first_word
            and self.first_word & 0xFF == INFLATED
        ):
            assert self.seen == self.file.checksum(0)
        self.first_word = self.seen = None

    @invariant()
    def both_see_the_same(self) -> None:
        assert self.view.states() == self.file.states()

    def teardown(self) -> None:
        self.view.close()
        self.file.close()
        self.data.close()
        os.close(self.fd)
        os.close(self.directory)


TestReaderBesideWriter = ReaderBesideWriter.TestCase
TestReaderBesideWriter.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
