"""Paths of sockets: only what nobody uses makes way."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from snapshotter.daemon.sockets import PATH_MAX, make_way
from snapshotter.errors import ConfigError


def test_what_is_not_there_needs_no_way(workdir: Path) -> None:
    make_way(str(workdir / "s"), "--address")


def test_a_socket_that_nobody_listens_on_is_removed(workdir: Path) -> None:
    path = workdir / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    make_way(str(path), "--address")
    assert not path.exists()


def test_a_socket_that_somebody_listens_on_stays(workdir: Path) -> None:
    path = workdir / "s"
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        used.listen()
        with pytest.raises(ConfigError, match=f"--address: another process listens on {path}"):
            make_way(str(path), "--address")
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_anything_else_stays(workdir: Path, kind: str) -> None:
    path = workdir / "s"
    match kind:
        case "file":
            path.write_text("data")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(workdir / "elsewhere")
    with pytest.raises(ConfigError, match=r"metrics_address: .*not a socket"):
        make_way(str(path), "metrics_address")
    assert path.is_symlink() or path.exists()


def test_the_longest_path_that_can_be_bound(workdir: Path) -> None:
    path = str(workdir) + "/" + "x" * (PATH_MAX - len(str(workdir)) - 1)
    make_way(path, "--address")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        make_way(path + "x", "--address")
