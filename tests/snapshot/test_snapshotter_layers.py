"""Prepare of an image layer: lazy, unpacked here, or left to the client; what each leaves behind."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.errors import (
    AlreadyExists,
    InvalidArgument,
    NoIndex,
    NotFound,
    Unavailable,
)
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.layers import Deferred, LayerRequest, Lazy, Local
from snapshotter.snapshot.model import (
    LABEL_HAS_INDEX,
    LABEL_NAMESPACE,
    LABEL_REMOTE,
    LABEL_TARGET,
    LABEL_UID_MAPPING,
    Kind,
    Owner,
    Usage,
)
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.conftest import ExpectedLogs
from tests.support import host
from tests.support.layer_providers import (
    LAZY_USAGE,
    DirectoryLayers,
    NoLayers,
    ScriptedLayers,
    some_digest,
)
from tests.support.snapshot_mounts import mounted

pytestmark = pytest.mark.usefixtures("root")

BASE, TOP = "sha256:base", "sha256:top"
CRI_LABELS = {"containerd.io/snapshot/cri.image-ref": "registry.example/image:1"}
LAZY = Lazy(some_digest("layer"), LAZY_USAGE)

Build = Callable[[NoLayers], Snapshotter]


@pytest.fixture
def build(workdir: Path) -> Iterator[Build]:
    root = workdir / "root"
    made: list[Snapshotter] = []

    def make(layers: NoLayers) -> Snapshotter:
        made.append(Snapshotter(root, SnapshotStore(metadata_path(root)), layers))
        return made[-1]

    yield make
    for snapshotter in made:
        snapshotter.close()
    host.detach_below(root)


def directories(workdir: Path) -> set[int]:
    return {int(name) for name in os.listdir(workdir / "root/snapshotter/snapshots")}


def prepare(sn: Snapshotter, target: str, parent: str = "", key: str = "") -> None:
    sn.prepare(key or f"extract {target}", parent, {LABEL_TARGET: target, **CRI_LABELS}, "default")


def prepare_existing(sn: Snapshotter, target: str, parent: str = "", key: str = "") -> None:
    with pytest.raises(AlreadyExists, match=f'^target snapshot "{target}": already exists$'):
        prepare(sn, target, parent, key)


def fields(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    (record,) = [one for one in caplog.records if one.getMessage() == "image layer prepared"]
    return record.__dict__


def test_a_lazy_layer_is_committed_under_its_target(
    build: Build, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sn = build(ScriptedLayers({BASE: LAZY}))
    with caplog.at_level(logging.INFO, "snapshotter"):
        prepare_existing(sn, BASE)
    info = sn.stat(BASE)
    assert (info.kind, info.parent) == (Kind.COMMITTED, "")
    assert info.labels == {
        **CRI_LABELS,
        LABEL_TARGET: BASE,
        LABEL_REMOTE: "remote snapshot",
        LABEL_NAMESPACE: "default",
        LABEL_HAS_INDEX: "true",
    }
    assert sn.usage(BASE) == LAZY_USAGE
    assert [one.name for one in sn.walk()] == [BASE]
    assert directories(workdir) == {1}
    assert fields(caplog)["remote-snapshot-prepared"] == "true"
    assert "defer-snapshot-runtime" not in fields(caplog)


def test_an_unpacked_layer_is_committed_without_the_remote_label(
    build: Build, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unpack(request: LayerRequest) -> None:
        (request.directory / "file").write_text("content")
        os.chown(request.directory, 12, 34)

    sn = build(ScriptedLayers({BASE: Local(Usage(8192, 2))}, unpack))
    with caplog.at_level(logging.INFO, "snapshotter"):
        prepare_existing(sn, BASE)
    assert LABEL_REMOTE not in sn.stat(BASE).labels
    assert sn.stat(BASE).labels[LABEL_HAS_INDEX] == "true"
    assert sn.usage(BASE) == Usage(8192, 2)
    with mounted(sn.prepare("container", BASE), workdir / "mount") as top:
        assert (top / "file").read_text() == "content"
        assert (top.stat().st_uid, top.stat().st_gid) == (12, 34)
    assert fields(caplog)["remote-snapshot-prepared"] == "false"
    assert fields(caplog)["local-snapshot-prepared"] == "true"


def test_a_deferred_layer_is_an_ordinary_snapshot(
    build: Build, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sn = build(ScriptedLayers({BASE: Deferred("no-index")}))
    labels = {LABEL_TARGET: BASE, **CRI_LABELS}
    with caplog.at_level(logging.INFO, "snapshotter"):
        mounts = sn.prepare("key", "", labels, "default")
    with mounted(mounts, workdir / "mount") as top:
        (top / "file").write_text("unpacked by the client")
    sn.commit("default/2/base", "key", labels)
    assert sn.stat("default/2/base").labels == labels
    assert sn.usage("default/2/base").inodes == 2
    assert len(directories(workdir)) == 1
    assert fields(caplog)["defer-snapshot-runtime"] == "true"
    assert fields(caplog)["reason"] == "no-index"
    assert fields(caplog)["remote-snapshot-prepared"] == fields(caplog)["local-snapshot-prepared"] == "false"


@pytest.mark.parametrize("error", [NoIndex("no index"), ValueError("a bug")])
def test_a_provider_that_raises_defers(
    build: Build, error: Exception, caplog: pytest.LogCaptureFixture, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer provider failed")
    sn = build(ScriptedLayers({BASE: error}))
    with caplog.at_level(logging.INFO, "snapshotter"):
        prepare(sn, BASE, key="key")
    assert sn.stat("key").kind == Kind.ACTIVE
    assert fields(caplog)["reason"] == "internal-error"
    (failure,) = expected_logs.records
    assert failure.exc_info is not None
    assert failure.exc_info[1] is error


def test_the_end_of_the_daemon_is_not_a_reason_to_pull_in_full(build: Build) -> None:
    sn = build(ScriptedLayers({BASE: Unavailable("not now")}))
    with pytest.raises(Unavailable, match="not now"):
        prepare(sn, BASE, key="key")
    with pytest.raises(NotFound):
        sn.stat("key")


@pytest.mark.parametrize("answer", [Deferred("unpack-failed"), ValueError("half way")])
def test_nothing_of_a_failed_attempt_reaches_the_client(
    build: Build, workdir: Path, answer: Deferred | Exception, expected_logs: ExpectedLogs
) -> None:
    """A provider may give up half way: with files unpacked, or with a layer mounted already."""
    if isinstance(answer, Exception):
        expected_logs.allow("layer provider failed")
    prepared = workdir / "layer"
    prepared.mkdir()
    layers = DirectoryLayers({BASE: prepared})
    mount = layers.provide

    def give_up(request: LayerRequest) -> Deferred:
        (request.directory / "half").write_text("unpacked")
        mount(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    layers.provide = give_up  # type: ignore[method-assign]
    sn = build(layers)
    with mounted(sn.prepare("key", "", {LABEL_TARGET: BASE}, "default"), workdir / "mount") as top:
        assert os.listdir(top) == []
        (top / "writable").touch()
    assert len(directories(workdir)) == 1
    assert layers.mounted == {}


def test_the_provider_is_told_what_it_needs(build: Build, workdir: Path) -> None:
    seen: list[tuple[list[str], int]] = []

    def look(request: LayerRequest) -> None:
        seen.append((os.listdir(request.directory), request.directory.stat().st_mode & 0o7777))

    layers = ScriptedLayers({BASE: LAZY, TOP: LAZY}, look)
    sn = build(layers)
    prepare_existing(sn, BASE)
    prepare_existing(sn, TOP, BASE)
    request = layers.requests[1]
    assert request.parent_ids == (layers.requests[0].snapshot_id,)
    assert request.directory == workdir / f"root/snapshotter/snapshots/{request.snapshot_id}/fs"
    assert request.labels == {LABEL_TARGET: TOP, LABEL_NAMESPACE: "default", **CRI_LABELS}
    assert request.namespace == "default"
    assert seen == [([], 0o755)] * 2


def test_no_transaction_is_open_while_a_layer_is_provided(build: Build) -> None:
    def use_the_store(_request: LayerRequest) -> None:
        sn.prepare("container")
        sn.remove("container")

    sn = build(ScriptedLayers({BASE: LAZY}, use_the_store))
    prepare_existing(sn, BASE)


def test_a_layer_that_is_there_is_not_asked_for_again(build: Build) -> None:
    layers = ScriptedLayers({BASE: LAZY})
    sn = build(layers)
    prepare_existing(sn, BASE, key="first")
    prepare_existing(sn, BASE, key="second")
    assert len(layers.requests) == 1


@pytest.mark.parametrize(
    ("key", "parent", "namespace", "kind"),
    [
        ("key", "missing", "default", NotFound),
        ("key", "active", "default", InvalidArgument),
        ("active", "", "default", AlreadyExists),
        ("", "", "default", InvalidArgument),
    ],
)
def test_a_bad_request_never_reaches_the_provider(
    build: Build, key: str, parent: str, namespace: str, kind: type[Exception]
) -> None:
    layers = ScriptedLayers({BASE: LAZY})
    sn = build(layers)
    sn.prepare("active")
    with pytest.raises(kind):
        sn.prepare(key, parent, {LABEL_TARGET: BASE}, namespace)
    assert layers.requests == []


def test_the_same_layer_on_another_parent_gets_another_name(build: Build) -> None:
    """A second namespace had to unpack the base itself, so its parent has a name of its own; the layer above
    can still be lazy there, and the client finds it by its target and that parent.
    """
    sn = build(ScriptedLayers({BASE: LAZY, TOP: LAZY}))
    prepare_existing(sn, BASE)
    prepare_existing(sn, TOP, BASE)
    sn.prepare("k8s/1/extract", "", {})
    sn.commit("k8s/2/base", "k8s/1/extract", {LABEL_TARGET: BASE})
    prepare_existing(sn, TOP, "k8s/2/base")
    prepare_existing(sn, TOP, "k8s/2/base", key="again")
    query = f'labels."{LABEL_TARGET}"=={TOP},parent=="k8s/2/base"'
    (found,) = sn.walk([query])
    assert found.kind == Kind.COMMITTED
    assert found.name not in {TOP, "k8s/2/base"}


def test_a_parent_that_goes_while_its_child_is_provided(build: Build, workdir: Path) -> None:
    sn = build(ScriptedLayers({BASE: LAZY, TOP: LAZY}))
    prepare_existing(sn, BASE)
    layers = ScriptedLayers({TOP: LAZY}, lambda _request: sn.remove(BASE))
    other = Snapshotter(workdir / "root", sn._store, layers)
    with pytest.raises(NotFound, match=BASE):
        prepare(other, TOP, BASE)
    assert layers.released == [2]
    assert directories(workdir) == {1}


def test_cleanup_spares_what_is_being_prepared(build: Build, workdir: Path) -> None:
    layers = ScriptedLayers({BASE: LAZY}, lambda _request: sn.cleanup())
    sn = build(layers)
    prepare_existing(sn, BASE)
    assert directories(workdir) == {1}
    assert layers.released == []


def test_real_mounts_from_pull_to_removal(build: Build, workdir: Path) -> None:
    contents = {BASE: ("bottom", "shared"), TOP: ("top", "shared")}
    prepared = {}
    for target, names in contents.items():
        prepared[target] = workdir / target
        prepared[target].mkdir()
        for name in names:
            (prepared[target] / name).write_text(target)
    layers = DirectoryLayers(prepared)
    sn = build(layers)
    prepare_existing(sn, BASE)
    prepare_existing(sn, TOP, BASE)
    with mounted(sn.prepare("container", TOP), workdir / "container") as top:
        assert [(top / name).read_text() for name in ("bottom", "top", "shared")] == [BASE, TOP, TOP]
        (top / "written").write_text("by the container")
    with mounted(sn.view("view", BASE), workdir / "view") as top:
        assert sorted(os.listdir(top)) == ["bottom", "shared"]
    assert layers.woken == [(2, 1), (1,)]
    assert layers.checked == layers.woken

    snapshots = workdir / "root/snapshotter/snapshots"
    for name in ("view", "container", TOP, BASE):
        sn.remove(name)
    assert len(host.mounts_below(snapshots)) == 2
    sn.cleanup()
    assert host.mounts_below(snapshots) == []
    assert directories(workdir) == set()
    assert (prepared[BASE] / "bottom").exists()


def test_a_lazy_layer_that_cannot_be_read_makes_its_users_unavailable(build: Build, workdir: Path) -> None:
    layers = ScriptedLayers({BASE: LAZY, TOP: LAZY})
    sn = build(layers)
    prepare_existing(sn, BASE)
    sn.prepare("running", BASE)
    layers.unavailable = {1}
    calls: list[Callable[[], object]] = [
        lambda: sn.prepare("new", BASE),
        lambda: sn.view("new", BASE),
        lambda: sn.mounts("running"),
    ]
    for call in calls:
        with pytest.raises(Unavailable, match='layer "1" unavailable'):
            call()
    assert [one.name for one in sn.walk()] == ["running", BASE]
    assert directories(workdir) == {1, 2}
    prepare_existing(sn, TOP, BASE)  # a layer above may be pulled all the same


def test_failing_to_wake_is_not_fatal(
    build: Build, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    def fail(ids: tuple[int, ...]) -> None:
        raise OSError(f"cannot wake {ids}")

    expected_logs.allow("could not be woken")
    layers = ScriptedLayers({BASE: LAZY})
    monkeypatch.setattr(layers, "wake", fail)
    sn = build(layers)
    prepare_existing(sn, BASE)
    assert sn.prepare("container", BASE)


def test_usage_of_a_lazy_layer_is_the_providers(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ScriptedLayers({BASE: LAZY})
    sn = build(layers)
    prepare_existing(sn, BASE)
    assert sn.usage(BASE) == LAZY_USAGE
    monkeypatch.setattr(layers, "usage", lambda snapshot_id: Usage(snapshot_id * 1000, 9))
    assert sn.usage(BASE) == Usage(1000, 9)


@pytest.mark.parametrize(("owner", "expected"), [(Owner(12, 34), Owner(12, 34)), (None, Owner(5, 6))])
def test_owners_pass_through_lazy_layers(
    build: Build, workdir: Path, owner: Owner | None, expected: Owner
) -> None:
    prepared = workdir / "layer"
    prepared.mkdir()
    sn = build(DirectoryLayers({TOP: prepared}, owner))
    with mounted(sn.prepare("extract", ""), workdir / "mount") as top:
        os.chown(top, 5, 6)
    sn.commit("unpacked", "extract")
    prepare_existing(sn, TOP, "unpacked")
    with mounted(sn.prepare("container", TOP), workdir / "mount") as top:
        assert Owner(top.stat().st_uid, top.stat().st_gid) == expected


def test_a_user_namespace_owns_its_root(build: Build, workdir: Path) -> None:
    sn = build(NoLayers())
    with mounted(sn.prepare("c", "", {LABEL_UID_MAPPING: "0:100000:65536"}), workdir / "mount") as top:
        assert (top.stat().st_uid, top.stat().st_gid) == (100000, 0)
    with pytest.raises(InvalidArgument, match="uidmapping"):
        sn.prepare("d", "", {LABEL_UID_MAPPING: "everybody"})
    assert [one.name for one in sn.walk()] == ["c"]


def test_what_cannot_be_deleted_is_tried_again(
    build: Build, workdir: Path, expected_logs: ExpectedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_snapshot_id: int, _directory: Path) -> bool:
        raise OSError("device is busy")

    expected_logs.allow("could not be deleted yet")
    layers = ScriptedLayers({BASE: LAZY})
    sn = build(layers)
    prepare_existing(sn, BASE)
    sn.prepare("container")
    sn.remove(BASE)
    sn.remove("container")
    with monkeypatch.context() as patch:
        patch.setattr(layers, "release", fail)
        sn.cleanup()
    assert directories(workdir) == {1, 2}
    sn.cleanup()
    assert directories(workdir) == set()
    assert len(expected_logs.records) == 2


def test_a_directory_that_is_gone_is_a_snapshot_that_is_gone(build: Build, workdir: Path) -> None:
    """What a call sees that was overtaken by Remove and Cleanup."""
    sn = build(NoLayers())
    sn.prepare("container")
    shutil.rmtree(workdir / "root/snapshotter/snapshots/1")
    calls: list[Callable[[], object]] = [
        lambda: sn.usage("container"),
        lambda: sn.commit("name", "container"),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="container"):
            call()


def test_close_closes_what_it_took_over_once(build: Build) -> None:
    layers = NoLayers()
    sn = build(layers)
    sn.close()
    sn.close()
    assert layers.closed == 1
    with pytest.raises(Unavailable):
        sn.stat("anything")


def test_overlay_options_are_passed_on(workdir: Path) -> None:
    store = SnapshotStore(metadata_path(workdir))
    sn = Snapshotter(workdir, store, NoLayers(), overlay_options=("userxattr",))
    sn.prepare("a-active")
    sn.commit("a", "a-active")
    (mount,) = sn.prepare("b", "a")
    assert mount.options[-1] == "userxattr"
    sn.close()
