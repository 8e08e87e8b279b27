"""The promises of a containerd snapshotter, as functions of one: what it answers, and (imported) about files.

`CHECKS` is all of them. They are run on the snapshotter in this process, and on one at the other end of a socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter.errors import (
    AlreadyExists,
    ContractError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from snapshotter.snapshot.model import Kind
from tests import contract_files
from tests.support.snapshot_contract import (
    CHECKS,
    GC_ROOT,
    AnySnapshotter,
    check,
    commit_layer,
    empty_committed,
    names,
)
from tests.support.snapshot_mounts import mounted
from tests.support.tree_steps import file

__all__ = ["CHECKS", "contract_files"]


@check
def stat_of_active(sn: AnySnapshotter, work: Path) -> None:
    with mounted(sn.prepare("preparing", "", GC_ROOT), work / "preparing"):
        info = sn.stat("preparing")
    assert (info.name, info.kind, info.parent, info.labels) == ("preparing", Kind.ACTIVE, "", GC_ROOT)


@check
def stat_of_committed(sn: AnySnapshotter, work: Path) -> None:
    commit_layer(sn, work, "committed", "", file("foo", "foo\n"))
    info = sn.stat("committed")
    assert (info.name, info.kind, info.parent, info.labels) == ("committed", Kind.COMMITTED, "", GC_ROOT)


@check
def parents_are_transitive(sn: AnySnapshotter, work: Path) -> None:
    commit_layer(sn, work, "a", "", file("foo", "foo\n"))
    commit_layer(sn, work, "b", "a", file("foo", "foo bar\n"))
    assert sn.stat("a").parent == ""
    assert sn.stat("b").parent == "a"
    assert sn.stat(sn.stat("b").parent).parent == ""


@check
def one_key_one_snapshot(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    for number, (first, second) in enumerate(
        [(sn.prepare, sn.view), (sn.prepare, sn.prepare), (sn.view, sn.view), (sn.view, sn.prepare)]
    ):
        first(f"key-{number}", "a", GC_ROOT)
        with pytest.raises(AlreadyExists):
            second(f"key-{number}", "a", GC_ROOT)
    with pytest.raises(AlreadyExists):
        sn.prepare("a", "", GC_ROOT)


@check
def bad_parents(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    sn.prepare("active", "a")
    sn.view("view", "a")
    for make in (sn.prepare, sn.view):
        with pytest.raises(NotFound):
            make("new", "missing")
        for uncommitted in ("active", "view"):
            with pytest.raises(InvalidArgument):
                make("new", uncommitted)
        with pytest.raises(InvalidArgument):
            make("", "a")
    assert names(sn.walk()) == ["a", "active", "view"]


@check
def missing_snapshots(sn: AnySnapshotter, work: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: sn.stat("missing"),
        lambda: sn.mounts("missing"),
        lambda: sn.usage("missing"),
        lambda: sn.remove("missing"),
        lambda: sn.update("missing", {"a": "b"}),
        lambda: sn.commit("name", "missing"),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="missing"):
            call()


@check
def bad_commits(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    sn.prepare("active", "a")
    sn.view("view", "a")
    refused: list[tuple[str, str, type[ContractError]]] = [
        ("a", "active", AlreadyExists),
        ("active", "active", AlreadyExists),
        ("new", "a", FailedPrecondition),
        ("new", "view", FailedPrecondition),
        ("", "active", InvalidArgument),
    ]
    for name, key, kind in refused:
        with pytest.raises(kind):
            sn.commit(name, key)
    assert names(sn.walk()) == ["a", "active", "view"]
    assert sn.stat("active").kind == Kind.ACTIVE


@check
def commit_with_a_parent(sn: AnySnapshotter, work: Path) -> None:
    commit_layer(sn, work, "base", "", file("below", "below\n"))
    with mounted(sn.prepare("rebased", "", GC_ROOT), work / "rebased") as top:
        file("above", "above\n")(top)
    for parent, kind in (("missing", NotFound), ("rebased", FailedPrecondition)):
        with pytest.raises(kind):
            sn.commit("top", "rebased", GC_ROOT, parent)
    sn.commit("top", "rebased", GC_ROOT, "base")
    assert sn.stat("top").parent == "base"
    with pytest.raises(FailedPrecondition):
        sn.remove("base")
    with mounted(sn.view("view", "top"), work / "view") as top:
        assert (top / "below").read_text() + (top / "above").read_text() == "below\nabove\n"

    empty_committed(sn, "other")
    sn.prepare("fixed", "base")
    with pytest.raises(InvalidArgument):
        sn.commit("new", "fixed", {}, "other")
    sn.commit("new", "fixed", {}, "base")
    assert sn.stat("new").parent == "base"


@check
def commit_starts_labels_and_times_anew(sn: AnySnapshotter, work: Path) -> None:
    sn.prepare("active", "", {"a": "1"})
    prepared = sn.stat("active")
    before = time.time() - 1e-6  # a message carries microseconds
    sn.commit("committed", "active", {"b": "2", "empty": ""})
    info = sn.stat("committed")
    assert info.labels == {"b": "2"}
    assert info.created == info.updated >= max(before, prepared.created)


@check
def update(sn: AnySnapshotter, work: Path) -> None:
    start = time.time() - 1e-6
    empty_committed(sn, "c1")
    empty_committed(sn, "c2", "c1")
    sn.prepare("a1", "c2", GC_ROOT)
    sn.prepare("a2", "", GC_ROOT)
    sn.view("v1", "c2", GC_ROOT)
    sn.view("v2", "", GC_ROOT)
    for name in ("c1", "c2", "a1", "a2", "v1", "v2"):
        check_update_of(sn, name, start)


def check_update_of(sn: AnySnapshotter, name: str, start: float) -> None:
    found = sn.stat(name)
    assert found.name == name
    assert start <= found.created == found.updated
    labels = {"l1": "v1", "l2": "v2", "l3": "v3", **GC_ROOT}
    changed = sn.update(name, labels)
    unchanged = [(one.name, one.parent, one.kind, one.created) for one in (found, changed)]
    assert unchanged[0] == unchanged[1]
    assert changed.updated >= found.updated
    assert changed.labels == labels

    changed = sn.update(name, {"l1": "updated", "l4": "v4"}, ["labels.l1", "labels.l2"])
    assert changed.labels == {"l1": "updated", "l3": "v3", **GC_ROOT}
    assert sn.stat(name) == changed
    assert sn.update(name, {"l4": "v4", "empty": ""}, ["labels"]).labels == {"l4": "v4"}
    with pytest.raises(InvalidArgument, match="parent"):
        sn.update(name, {}, ["labels.l4", "parent"])
    assert sn.stat(name).labels == {"l4": "v4"}


@check
def remove_frees_the_key(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "committed")
    sn.prepare("reuse", "committed")
    sn.remove("reuse")
    sn.view("reuse", "committed")
    sn.remove("reuse")
    sn.prepare("reuse", "")
    sn.remove("committed")
    sn.commit("committed", "reuse")
    assert sn.stat("committed").kind == Kind.COMMITTED


@check
def remove_in_the_middle_of_a_chain(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "base")
    empty_committed(sn, "middle", "base")
    sn.prepare("top", "middle")
    for parent in ("middle", "base"):
        with pytest.raises(FailedPrecondition, match="remove"):
            sn.remove(parent)
    for name in ("top", "middle", "base"):
        sn.remove(name)
    assert names(sn.walk()) == []


@check
def walk_with_filters(sn: AnySnapshotter, work: Path) -> None:
    root = 'labels."containerd.io/gc.root"==contract'
    empty_committed(sn, "p")
    sn.prepare("p-l-active", "", GC_ROOT)
    sn.commit("p-l", "p-l-active", {"l": "1", **GC_ROOT})
    sn.prepare("a", "p", GC_ROOT)
    sn.view("v", "p", GC_ROOT)
    sn.prepare("a-top", "", GC_ROOT)
    sn.prepare("a-l", "p-l", {"l": "2", **GC_ROOT})
    sn.view("v-l", "p-l", {"l": "3", **GC_ROOT})
    sn.prepare("a-top-l", "", {"l": "2", **GC_ROOT})
    everything = ["a", "a-l", "a-top", "a-top-l", "p", "p-l", "v", "v-l"]
    cases: list[tuple[list[str], list[str]]] = [
        ([], everything),
        ([""], everything),
        ([root], everything),
        ([f"kind==active,{root}"], ["a", "a-l", "a-top", "a-top-l"]),
        ([f"kind==view,{root}"], ["v", "v-l"]),
        (["kind==committed"], ["p", "p-l"]),
        (["name==p", "name==a-top-l"], ["a-top-l", "p"]),
        (["name==a-l,labels.l"], ["a-l"]),
        (["parent==p"], ["a", "v"]),
        ([f'parent!="",{root}'], ["a", "a-l", "v", "v-l"]),
        (["labels.l"], ["a-l", "a-top-l", "p-l", "v-l"]),
        (["labels.l==2"], ["a-l", "a-top-l"]),
        (["name~=^v"], ["v", "v-l"]),
        (["name==nobody"], []),
    ]
    for filters, expected in cases:
        assert names(sn.walk(filters)) == expected, filters
    with pytest.raises(InvalidArgument, match="kind="):
        list(sn.walk(["kind=active"]))


@check
def stat_in_a_walk(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "c1")
    empty_committed(sn, "c2", "c1")
    sn.prepare("a1", "c2", GC_ROOT)
    sn.view("v1", "c2", GC_ROOT)
    walked = 0
    for info in sn.walk():
        assert sn.stat(info.name) == info
        walked += 1
    assert walked == 4


@check
def change_in_a_walk(sn: AnySnapshotter, work: Path) -> None:
    for number in range(4):
        sn.prepare(f"a{number}", "")
    for info in sn.walk():
        sn.remove(info.name)
        sn.prepare(f"{info.name}-again", "")
    assert names(sn.walk()) == [f"a{number}-again" for number in range(4)]


@check
def mounts_are_given_again(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    empty_committed(sn, "b", "a")
    for make in (sn.prepare, sn.view):
        for parent in ("", "a", "b"):
            key = f"{make.__name__}-{parent}"
            assert make(key, parent) == sn.mounts(key)
    with pytest.raises(FailedPrecondition):
        sn.mounts("a")


@check
def cleanup_spares_what_is_there(sn: AnySnapshotter, work: Path) -> None:
    commit_layer(sn, work, "a", "", file("foo", "foo\n"))
    mounts = sn.prepare("top", "a")
    sn.prepare("gone", "a")
    sn.remove("gone")
    sn.cleanup()
    sn.cleanup()
    with mounted(mounts, work / "top") as top:
        assert (top / "foo").read_text() == "foo\n"


@check
def close_twice(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    sn.remove("a")
    sn.close()
    sn.close()
