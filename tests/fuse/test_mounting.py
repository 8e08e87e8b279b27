"""mount(2), umount2(2) and what the kernel tells of mounts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.fuse import kernel, mounting
from snapshotter.fuse.mountpoint import is_dead, make_mount
from tests.support import host
from tests.support.process import open_descriptors

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def target(workdir: Path) -> Path:
    path = workdir / "with space\nand\ttab \\ 漢"
    path.mkdir()
    return path


@pytest.fixture
def mounted(target: Path) -> Iterator[int]:
    """A mount that nobody serves; its INIT is read and not answered."""
    device, _unique = make_mount(str(target))
    fd = device.fd
    yield fd
    while mounting.detach(str(target)):
        pass
    device.close()


def found(target: Path) -> list[mounting.MountInfo]:
    return mounting.mounts_below(str(target.parent))


def test_a_mount_is_found_by_its_name_however_odd(target: Path, mounted: int) -> None:
    (info,) = found(target)
    assert info[:3] == (os.fsencode(target), "fuse.soci", "soci")
    assert mounting.mounts_below(str(target)) == found(target)
    assert mounting.mounts_below(str(target)[:-1]) == []  # a neighbour of almost that name


def test_it_is_read_only_and_nothing_else(target: Path, mounted: int) -> None:
    (entry,) = host.mounts_below(target)
    assert {"ro", "allow_other", "default_permissions"} <= set(entry.options.split(","))
    rows = [line.split() for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    (options,) = [set(row[5].split(",")) for row in rows if row[2] == entry.device]
    assert "ro" in options
    assert not {"nosuid", "nodev", "noexec"} & options


def test_the_kernel_begins_with_an_offer(target: Path) -> None:
    device, unique = make_mount(str(target))
    fd, init = device.fd, device.init
    assert unique > 0
    assert init.minor >= kernel.OLDEST_MINOR
    assert not is_dead(fd)
    assert mounting.detach(str(target))
    device.close()


def test_what_is_no_fuse_device_is_dead(workdir: Path) -> None:
    with open(os.devnull, "rb") as null, open(workdir / "file", "wb") as file:
        assert is_dead(null.fileno())
        assert is_dead(file.fileno())
    fd = mounting.open_device()  # never mounted
    assert is_dead(fd)
    os.close(fd)


def test_detaching_ends_an_unused_mount(target: Path, mounted: int) -> None:
    assert mounting.detach(str(target)) is True
    assert is_dead(mounted)
    assert found(target) == []
    assert mounting.detach(str(target)) is False


def test_what_is_no_mount_or_not_there_is_no_error(target: Path) -> None:
    assert mounting.detach(str(target)) is False
    assert mounting.detach(str(target / "missing")) is False


def test_a_link_is_not_followed(target: Path, mounted: int, workdir: Path) -> None:
    (workdir / "link").symlink_to(target)
    assert mounting.detach(str(workdir / "link")) is False
    assert len(found(target)) == 1


def test_mounts_on_mounts_are_taken_one_by_one(target: Path, mounted: int) -> None:
    device, _unique = make_mount(str(target))
    fd = device.fd
    assert len(found(target)) == 2
    assert mounting.detach(str(target))
    assert is_dead(fd)
    assert not is_dead(mounted)
    device.close()


@pytest.mark.parametrize(("name", "number"), [("missing", errno.ENOENT), ("file", errno.ENOTDIR)])
def test_a_target_that_is_no_directory(workdir: Path, name: str, number: int) -> None:
    (workdir / "file").write_text("x")
    before = open_descriptors()
    with pytest.raises(OSError, match="mount of a lazy layer") as info:
        make_mount(str(workdir / name))
    assert info.value.errno == number
    assert info.value.filename == str(workdir / name)
    assert open_descriptors() == before


def test_a_kernel_that_is_too_old_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "OLDEST_MINOR", 1000)
    before = open_descriptors()
    with pytest.raises(ValueError, match=r"7\.1000 or newer"):
        make_mount(str(target))
    assert found(target) == []
    assert open_descriptors() == before


def test_the_descriptor_is_blocking_and_stays_here() -> None:
    fd = mounting.open_device()
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_read_ahead_is_set_for_this_mount_alone(target: Path, mounted: int, workdir: Path) -> None:
    other = workdir / "other"
    other.mkdir()
    device, _unique = make_mount(str(other))
    mounting.set_read_ahead(str(target), 256)
    (workdir / "link").symlink_to(workdir)
    mounting.set_read_ahead(str(workdir / "link/other"), 64)
    assert (read_ahead(target), read_ahead(other)) == (256, 64)
    mounting.detach(str(other))
    device.close()


def read_ahead(target: Path) -> int:
    (entry,) = host.mounts_below(target)
    return int(Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text(encoding="ascii"))


def test_what_is_not_mounted_has_no_read_ahead(target: Path) -> None:
    with pytest.raises(OSError, match="nothing is mounted"):
        mounting.set_read_ahead(str(target), 128)
