"""Unpacking a layer in a process of its own: the program as the daemon runs it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapshotter.layer.compile import compile_tree
from snapshotter.layer.inherit import Parent
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm
from tests.support.images import Entry, LayerBlob, directory, hardlink, layer, symlink, tar

Named = tuple[str, Entry | bytes]
FILES: list[Named] = [
    ("d/", directory(0o750, uid=3, gid=4)),
    ("d/big", b"0123456789" * 200_000),
    ("d/small", Entry(b"s", mode=0o4711)),
    ("d/link", symlink("small")),
    ("d/twin", hardlink("d/small", mode=0o4711)),
]
pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "fs"
    path.mkdir()
    return path


def unpack(
    blob: LayerBlob,
    target: Path,
    *,
    compression: str = "gzip",
    diff_id: str = "",
    data: bytes | None = None,
    parents: Sequence[Parent] = (),
) -> dict[str, Any]:
    """Run the program on a blob (or on `data` in its place) and return its answer."""
    content = blob.content if data is None else data
    assert isinstance(content, bytes)
    rows = [{"tree": str(p.tree)} if p.tree else {"directory": str(p.directory)} for p in parents]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as scratch, pipe() as (lifeline, _):
        source.write(content)
        source.flush()
        result = subprocess.run(
            [
                sys.executable, "-m", "snapshotter.layer.unpack", "--blob", str(source.fileno()),
                "--tar", str(scratch.fileno()), "--target", str(target), "--compression", compression,
                "--diff-id", diff_id or blob.diff_id, "--lifeline", str(lifeline), *([] if parents else ["--base"]),
            ],
            input=b"\n" + json.dumps(rows).encode() + b"\n", capture_output=True, check=False,
            pass_fds=(source.fileno(), scratch.fileno(), lifeline),
        )  # fmt: skip
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == (1 if "error" in answer else 0)
    assert result.stderr == b""
    return answer


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Give the two ends of a pipe."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def lazy_parent(path: Path, entries: Iterable[Named]) -> Parent:
    path.write_bytes(compile_tree(build([tar(entries)], algorithm=Algorithm.UNCOMPRESSED).ztoc))
    return Parent(tree=path)


def unpacked_parent(path: Path, entries: Iterable[Named]) -> Parent:
    path.mkdir()
    assert "error" not in unpack(layer(entries), path)
    return Parent(directory=path)


def test_it_ends_with_its_parent(target: Path) -> None:
    lifeline, end = os.pipe()
    blob = layer({"implied/file": b"x"})
    assert isinstance(blob.content, bytes)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as scratch:
        source.write(blob.content)
        source.flush()
        command = [
            sys.executable, "-m", "snapshotter.layer.unpack", "--blob", str(source.fileno()),
            "--tar", str(scratch.fileno()), "--lifeline", str(lifeline), "--target", str(target),
            "--compression", "gzip", "--diff-id", blob.diff_id,
        ]  # fmt: skip
        passed = [lifeline, source.fileno(), scratch.fileno()]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=passed
        ) as child:
            os.close(lifeline)
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline()) == {"waiting": True}
            assert child.poll() is None, "it waits for the layers below"
            os.close(end)  # as the kernel does for a parent that is killed
            assert child.wait(20) == 1
            assert child.stdout.read() == b""
    assert below(target) == set()


@pytest.mark.parametrize("compression", ["gzip", "members", "zstd", "uncompressed"])
def test_every_compression(target: Path, compression: str) -> None:
    name = "gzip" if compression == "members" else compression
    answer = unpack(layer(FILES, compression=compression), target, compression=name)
    assert below(target) == {"d", "d/big", "d/small", "d/link", "d/twin"}
    assert (target / "d/big").read_bytes() == FILES[1][1]
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o750
    assert (target / "d").stat().st_uid == 3
    assert (target / "d/small").stat().st_ino == (target / "d/twin").stat().st_ino
    assert stat.S_IMODE((target / "d/small").stat().st_mode) == 0o4711
    assert answer["inodes"] == 5  # with the root
    assert answer["size"] >= 2_000_000


def test_a_layer_that_is_not_what_the_config_says(target: Path) -> None:
    wrong = "sha256:" + "1" * 64
    blob = layer(FILES)
    answer = unpack(blob, target, diff_id=wrong)
    assert answer["error"] == "DigestMismatch"
    assert blob.diff_id in answer["message"]
    assert wrong in answer["message"]
    assert below(target) == set()


@pytest.mark.parametrize("compression", ["gzip", "zstd", "uncompressed"])
def test_a_truncated_blob(target: Path, compression: str) -> None:
    blob = layer(FILES, compression=compression)
    assert isinstance(blob.content, bytes)
    answer = unpack(blob, target, compression=compression, data=blob.content[: len(blob.content) // 2])
    assert answer["error"] in {"InvalidTar", "DigestMismatch"}
    assert below(target) == set()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_rubbish_is_not_a_layer(target: Path, compression: str) -> None:
    assert (
        unpack(layer(FILES), target, compression=compression, data=b"rubbish" * 1000)["error"] == "InvalidTar"
    )


def test_an_empty_blob(target: Path) -> None:
    assert "error" in unpack(layer(FILES), target, data=b"")


def test_a_compression_that_nobody_knows(target: Path) -> None:
    answer = unpack(layer(FILES), target, compression="lzma")
    assert answer["error"] == "UnsupportedLayer"
    assert "lzma" in answer["message"]


def test_what_containerd_refuses_is_refused(target: Path) -> None:
    answer = unpack(layer([("d/link", hardlink("d/nothing"))]), target)
    assert answer["error"] == "UnsupportedLayer"
    assert "d/nothing" in answer["message"]


def test_names_that_lead_out_stay_inside(target: Path, tmp_path: Path) -> None:
    entries: list[Named] = [
        ("../../escaped", b"1"),
        ("/absolute", b"2"),
        ("a/../../../b/../climbing", b"3"),
        ("out", symlink("../..")),
        ("out/through", b"4"),
        ("link", symlink("/etc")),
        ("link/planted", b"5"),
    ]
    answer = unpack(layer(entries), target)
    assert "error" not in answer
    expected = {"escaped", "absolute", "climbing", "out", "through", "link", "etc", "etc/planted"}
    assert below(target) == expected
    assert os.listdir(tmp_path) == ["fs"]
    assert not Path("/etc/planted").exists()


def test_a_target_that_cannot_be_written_is_said_as_an_error(tmp_path: Path) -> None:
    answer = unpack(layer(FILES), tmp_path / "missing")
    assert answer["error"] == "ProcessFailed"
    assert "missing" in answer["message"]


def test_a_target_that_is_not_empty_is_not_mixed_with(target: Path) -> None:
    (target / "d").mkdir()
    assert unpack(layer(FILES), target)["error"] == "ProcessFailed"


HIDING: list[Named] = [
    ("d/", directory()),
    ("d/.wh.gone", b""),
    ("e/", directory()),
    ("e/.wh..wh..opq", b""),
    ("tmp/new", b"N"),
]
BELOW: list[Named] = [("tmp/", directory(0o1777)), ("d/gone", b"G")]


def test_whiteouts_of_a_bottom_layer_leave_nothing(target: Path) -> None:
    unpack(layer(HIDING), target)
    assert below(target) == {"d", "e", "tmp", "tmp/new"}
    assert os.listxattr(target / "e") == []


@pytest.mark.parametrize("kind", ["lazy", "unpacked"])
def test_whiteouts_over_a_parent_of_any_kind(target: Path, tmp_path: Path, kind: str) -> None:
    make = lazy_parent if kind == "lazy" else unpacked_parent
    unpack(layer(HIDING), target, parents=[make(tmp_path / "parent", BELOW)])
    gone = (target / "d/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(target / "e", "trusted.overlay.opaque") == b"y"
    assert stat.S_IMODE((target / "tmp").stat().st_mode) == 0o1777  # implied, and as below


def test_the_nearest_parent_comes_first(target: Path, tmp_path: Path) -> None:
    parents = [
        unpacked_parent(tmp_path / "near", [("tmp/", directory(0o700))]),
        lazy_parent(tmp_path / "far", BELOW),
    ]
    unpack(layer(HIDING), target, parents=parents)
    assert stat.S_IMODE((target / "tmp").stat().st_mode) == 0o700
