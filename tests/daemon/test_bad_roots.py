"""Roots that are not as a daemon left them: newer, half removed, on odd file systems, with odd things in the holder."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from snapshotter.errors import AlreadyExists, NotFound, Unavailable
from snapshotter.fuse.holding import HolderClient
from tests.support import host
from tests.support.images import directory, tar
from tests.support.indexed import IndexedImage, publish
from tests.support.process import Daemon, Service, wait_until
from tests.support.registry import Registry, Status
from tests.support.snapshot_mounts import mount
from tests.support.snapshots_client import RemoteSnapshotter

pytestmark = pytest.mark.usefixtures("fuse")

CHAIN = "sha256:chain-0"
CONTENT = b"lazy " * 50_000
SNAPSHOTS = "snapshotter/snapshots"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32


@pytest.fixture
def image() -> Iterator[IndexedImage]:
    with Registry() as registry:
        yield publish(registry, [tar({"file": CONTENT})])


@pytest.fixture
def daemon(workdir: Path) -> Iterator[Daemon]:
    daemon = Daemon(workdir / "d")
    yield daemon
    daemon.cleanup()


@contextmanager
def client_of(daemon: Daemon) -> Iterator[RemoteSnapshotter]:
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        yield RemoteSnapshotter(channel)


def pull(daemon: Daemon, image: IndexedImage) -> Path:
    """Pull the image's layer lazily; return where it is mounted."""
    with client_of(daemon) as client, pytest.raises(AlreadyExists):
        client.prepare("extract", labels=image.labels())
    (lazy,) = daemon.status()["mounts"]
    return Path(lazy["target"])


def refusal(daemon: Daemon) -> str:
    """Start a daemon that must refuse to; return what it says."""
    Service.start(daemon)
    wait_until(lambda: not daemon.alive, timeout=60, what="the daemon has refused")
    return daemon.log_text()


def test_a_root_of_a_newer_version_is_refused_and_left_alone(daemon: Daemon, image: IndexedImage) -> None:
    pull(daemon_started(daemon), image)
    daemon.stop()
    path = daemon.root / "snapshotter/metadata.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    daemon.log.unlink()
    assert "is of version 99, this program knows up to" in refusal(daemon)
    assert path.read_bytes() == before
    assert len(host.mounts_below(daemon.root)) == 1, "the mount is left to the newer version"


def daemon_started(daemon: Daemon) -> Daemon:
    daemon.start()
    return daemon


def of_a_newer_version(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def test_states_of_a_newer_version_are_made_again(daemon: Daemon, image: IndexedImage) -> None:
    mounted = pull(daemon_started(daemon), image)
    assert (mounted / "file").read_bytes() == CONTENT
    daemon.cleanup()
    (layer,) = (daemon.root / "layers/sha256").iterdir()
    of_a_newer_version(layer / "spans", *layer.glob("trace"))
    daemon.start()
    assert (mounted / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10)])
def test_trees_that_cannot_be_used_are_made_again_in_every_variant(
    daemon: Daemon, damage: Callable[[Path], None]
) -> None:
    """The upper layer has a tree of its own: a directory that it only implies looks like the one below."""
    lower = tar({"d/": directory(mode=0o711), "d/low": b"l"})
    with Registry() as registry:
        image = publish(registry, [lower, tar({"d/up": CONTENT})])
        with client_of(daemon_started(daemon)) as client:
            for layer, parent in ((0, ""), (1, CHAIN)):
                with pytest.raises(AlreadyExists):
                    client.prepare(f"extract-{layer}", parent, image.labels(layer))
        targets = [Path(mount["target"]) for mount in daemon.status()["mounts"]]
        assert (targets[1] / "d/up").read_bytes() == CONTENT
        assert (targets[0] / "d/low").read_bytes() == b"l"
        daemon.kill()
        trees = sorted((daemon.root / "layers/sha256").glob("*/tree*"))
        assert len(trees) == 3
        for tree in trees:
            damage(tree)
        registry.fault(Status(status=500, count=-1))
        daemon.start()
        assert (targets[1] / "d/up").read_bytes() == CONTENT  # waits until its mount has a tree again
        assert (targets[1] / "d").stat().st_mode & 0o777 == 0o711
        assert (targets[0] / "d/low").read_bytes() == b"l"
        assert sorted((daemon.root / "layers/sha256").glob("*/tree*")) == trees


def test_a_tree_of_a_newer_version_is_made_again(daemon: Daemon, image: IndexedImage) -> None:
    mounted = pull(daemon_started(daemon), image)
    daemon.cleanup()
    (layer,) = (daemon.root / "layers/sha256").iterdir()
    of_a_newer_version(*layer.glob("tree*"))
    daemon.start()
    wait_until(lambda: daemon.status()["mounts"], timeout=60, what="it is mounted anew")
    assert (mounted / "file").read_bytes() == CONTENT


def test_a_layer_without_tree_and_ztoc_comes_back_with_its_registry(daemon: Daemon) -> None:
    with Registry() as registry:
        image = publish(registry, [tar({"file": CONTENT})])
        mounted = pull(daemon_started(daemon), image)
        daemon.cleanup()
        (layer,) = (daemon.root / "layers/sha256").iterdir()
        for name in ("tree", "ztoc"):
            (layer / name).unlink()
        fault = registry.fault(Status(status=404, count=-1, path=image.layers[0].ztoc_digest))
        daemon.start()
        wait_until(lambda: fault.hits, timeout=60, what="the first try has failed")
        with client_of(daemon) as client, pytest.raises(Unavailable):
            client.view("view", CHAIN)
        registry.clear_faults()
        wait_until(lambda: daemon.status()["mounts"], timeout=120, what="it is mounted at last")
        assert (mounted / "file").read_bytes() == CONTENT


def test_snapshots_that_were_half_removed_are_removed_or_named(daemon: Daemon, image: IndexedImage) -> None:
    mounted = pull(daemon_started(daemon), image)
    with client_of(daemon) as client:
        client.prepare("gone", "")
    daemon.stop()
    snapshots = daemon.root / SNAPSHOTS
    known = {path.name for path in snapshots.iterdir()}
    (missing,) = known - {mounted.parent.name}
    os.rename(
        snapshots / missing, snapshots / "77"
    )  # a directory that no row knows, and a row without a directory
    daemon.start()
    with client_of(daemon) as client:
        client.cleanup()
        assert not (snapshots / "77").exists()
        client.remove("gone")
        with pytest.raises(NotFound):
            client.stat("gone")
        client.cleanup()
    assert (mounted / "file").read_bytes() == CONTENT


def test_a_lazy_layer_whose_mount_point_is_gone_does_not_keep_the_daemon_away(
    daemon: Daemon, image: IndexedImage
) -> None:
    mounted = pull(daemon_started(daemon), image)
    daemon.cleanup()
    mounted.rmdir()
    daemon.start()
    with client_of(daemon) as client:
        client.remove(CHAIN)
        client.cleanup()
    wait_until(lambda: daemon.status()["mounts"] == [], timeout=60, what="the mount is forgotten")
    assert list((daemon.root / SNAPSHOTS).iterdir()) == []


@pytest.mark.parametrize("flags", [_MS_NOEXEC | _MS_NOSUID | _MS_NODEV], ids=["noexec"])
def test_a_root_where_nothing_may_be_executed(daemon: Daemon, image: IndexedImage, flags: int) -> None:
    daemon.root.mkdir()
    mount("tmpfs", daemon.root, "tmpfs", flags, "mode=0700")
    mounted = pull(daemon_started(daemon), image)
    assert (mounted / "file").read_bytes() == CONTENT
    daemon.kill()
    daemon.start()
    assert (mounted / "file").read_bytes() == CONTENT


def test_a_root_that_is_read_only_is_refused(daemon: Daemon) -> None:
    daemon.root.mkdir()
    mount("tmpfs", daemon.root, "tmpfs", 0, "mode=0700")
    mount("", daemon.root, "", _MS_REMOUNT | _MS_RDONLY, "")
    assert f"root directory {daemon.root} cannot be used: Read-only file system" in refusal(daemon)


def test_what_the_holder_has_and_nobody_knows_is_left_alone(daemon: Daemon, image: IndexedImage) -> None:
    """Of a newer version, say: its names are not ours to read."""
    mounted = pull(daemon_started(daemon), image)
    daemon.stop()
    holder = HolderClient(str(daemon.root / "holder.sock"))
    holder.connect()
    with open(os.devnull, "rb") as other:
        holder.put("7-of-a-newer-version", other.fileno())
    daemon.start()
    assert (mounted / "file").read_bytes() == CONTENT
    names = holder.kept()
    for fd in names.values():
        os.close(fd)
    holder.close()
    assert "7-of-a-newer-version" in names


def test_a_held_descriptor_that_is_no_connection_any_more_is_mounted_again(
    daemon: Daemon, image: IndexedImage
) -> None:
    mounted = pull(daemon_started(daemon), image)
    daemon.kill()
    holder = HolderClient(str(daemon.root / "holder.sock"))
    holder.connect()
    reading, writing = os.pipe()
    os.close(writing)
    for name, fd in holder.kept().items():
        os.close(fd)
        holder.put(name, reading)
    os.close(reading)
    holder.close()
    daemon.start()
    assert (mounted / "file").read_bytes() == CONTENT
