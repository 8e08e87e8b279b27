"""The promises of a containerd snapshotter about files: written and read through real mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.errors import FailedPrecondition, NotFound
from snapshotter.snapshot.model import Kind, Usage
from tests.support.snapshot_contract import (
    GC_ROOT,
    AnySnapshotter,
    check,
    check_chain,
    commit_layer,
    empty_committed,
    names,
)
from tests.support.snapshot_mounts import mounted
from tests.support.tree_steps import contents, directory, file, linked, owned, removed, renamed, steps


@check
def basic(sn: AnySnapshotter, work: Path) -> None:
    flat = work / "flat"
    flat.mkdir()
    first = steps(file("foo", "foo\n", 0o777), directory("a"), directory("a/b"), directory("a/b/c"))
    second = steps(file("bar", "bar\n", 0o777), file("foo", "bar\n", 0o777), removed("a/b"))
    with mounted(sn.prepare("preparing", "", GC_ROOT), work / "preparing") as top:
        first(top)
    sn.commit("committed", "preparing", GC_ROOT)
    assert (sn.stat("committed").kind, sn.stat("committed").parent) == (Kind.COMMITTED, "")
    with pytest.raises(NotFound):
        sn.stat("preparing")

    first(flat)
    with mounted(sn.prepare("next", "committed", GC_ROOT), work / "next") as top:
        assert contents(top) == contents(flat)
        second(top)
    assert (sn.stat("next").kind, sn.stat("next").parent) == (Kind.ACTIVE, "committed")
    sn.commit("committed-next", "next", GC_ROOT)
    assert (sn.stat("committed-next").kind, sn.stat("committed-next").parent) == (Kind.COMMITTED, "committed")
    with pytest.raises(NotFound):
        sn.stat("next")

    walked = {info.name: info for info in sn.walk()}
    assert walked == {name: sn.stat(name) for name in ("committed", "committed-next")}
    second(flat)
    with mounted(sn.view("view", "committed-next", GC_ROOT), work / "view") as top:
        assert contents(top) == contents(flat)
    sn.remove("view")
    with pytest.raises(FailedPrecondition, match="remove"):
        sn.remove("committed")
    sn.remove("committed-next")
    sn.remove("committed")
    assert names(sn.walk()) == []


@check
def layer_file_update(sn: AnySnapshotter, work: Path) -> None:
    check_chain(
        sn,
        work,
        steps(
            directory("etc", 0o700),
            file("etc/hosts", "mydomain 10.0.0.1"),
            file("etc/profile", "PATH=/usr/bin"),
        ),
        steps(
            file("etc/hosts", "mydomain 10.0.0.2"),
            file("etc/profile", "PATH=/usr/bin", 0o666),
            directory("root", 0o700),
            file("root/.bashrc", "PATH=/usr/sbin:/usr/bin"),
        ),
    )


@check
def remove_a_directory_of_a_lower_layer(sn: AnySnapshotter, work: Path) -> None:
    check_chain(
        sn,
        work,
        steps(directory("lib", 0o700), file("lib/hidden", "")),
        steps(removed("lib"), directory("lib", 0o700), file("lib/not-hidden", "")),
        file("lib/newfile", ""),
    )


@check
def chown(sn: AnySnapshotter, work: Path) -> None:
    paths = ("opt", "opt/a", "opt/a/b")
    check_chain(
        sn,
        work,
        steps(*(directory(path, 0o700) for path in paths), file("opt/a/b/file.txt", "hello")),
        steps(*(owned(path, 1, 1) for path in (*paths, "opt/a/b/file.txt"))),
    )


@check
def directory_owners_survive_the_commit(sn: AnySnapshotter, work: Path) -> None:
    check_chain(
        sn,
        work,
        steps(
            *(directory(f"dir{number}", 0o700) for number in range(1, 6)),
            file("dir4/f1", "..."),
            file("dir5/f1", "..."),
            *(owned(path, 1, 1) for path in ("dir1", "dir2", "dir3", "dir5", "dir5/f1")),
        ),
        steps(owned("dir2", 0, 0), removed("dir3"), owned("dir4", 1, 1), owned("dir4/f1", 1, 1)),
        steps(
            *(directory("dir3", 0o700), owned("dir3", 1, 1)),
            *(removed("dir5"), directory("dir5", 0o700), owned("dir5", 1, 1)),
        ),
    )


@check
def deleted_files_stay_deleted(sn: AnySnapshotter, work: Path) -> None:
    check_chain(sn, work, steps(file("foo", "foo\n"), file("foobar", "foobar\n")), removed("foobar"), steps())


@check
def move_a_file_of_a_lower_layer(sn: AnySnapshotter, work: Path) -> None:
    check_chain(
        sn,
        work,
        steps(
            *(directory("dir1", 0o700), file("dir1/f1", "Hello")),
            *(directory("dir2", 0o700), file("dir2/f2", "...")),
        ),
        steps(
            *(directory("dir3", 0o700), file("dir3/f1", "Hello"), removed("dir1")),
            *(linked("dir2/f2", "dir3/f2"), removed("dir2/f2")),
        ),
    )


@check
def rename_files_of_a_lower_layer(sn: AnySnapshotter, work: Path) -> None:
    check_chain(
        sn,
        work,
        steps(
            directory("files", 0o700), file("files/f1", "was here first!"), file("files/f2", "nothing new")
        ),
        steps(
            file("files/f1-overwrite", "new content 1"),
            renamed("files/f1-overwrite", "files/f1"),
            renamed("files/f2", "files/f3"),
        ),
    )


@check
def views_are_read_only(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    empty_committed(sn, "b", "a")
    for parent in ("", "a", "b"):
        with (
            mounted(sn.view(f"view-{parent}", parent), work / f"view-{parent}") as top,
            pytest.raises(OSError, match="Read-only"),
        ):
            (top / "file").write_text("content")


@check
def the_root_is_0755(sn: AnySnapshotter, work: Path) -> None:
    empty_committed(sn, "a")
    for parent in ("", "a"):
        with mounted(sn.prepare(f"active-{parent}", parent), work / f"active-{parent}") as top:
            assert top.stat().st_mode & 0o7777 == 0o755


@check
def the_owner_of_the_root_is_inherited(sn: AnySnapshotter, work: Path) -> None:
    commit_layer(sn, work, "a", "", owned(".", 12, 34))
    commit_layer(sn, work, "b", "a", steps())
    with mounted(sn.prepare("top", "b"), work / "top") as top:
        assert (top.stat().st_uid, top.stat().st_gid) == (12, 34)


@check
def usage_counts_what_is_written(sn: AnySnapshotter, work: Path) -> None:
    with mounted(sn.prepare("active", "", GC_ROOT), work / "active") as top:
        before = sn.usage("active")
        file("file", "x" * 100_000)(top)
        linked("file", "link")(top)
        after = sn.usage("active")
    assert after.inodes == before.inodes + 1
    assert 100_000 <= after.size - before.size <= 110_000
    sn.commit("committed", "active", GC_ROOT)
    assert sn.usage("committed") == after
    sn.view("view", "committed")
    assert sn.usage("view") == Usage(0, 0)


@check
def mount_128_layers(sn: AnySnapshotter, work: Path) -> None:
    flat = work / "flat"
    flat.mkdir()
    parent = ""
    for number in range(128):
        change = steps(
            file("overwritten", f"{number}\n", 0o777),
            *([directory("shared")] if number == 0 else [removed("replaced")]),
            file(f"shared/file-{number}", "same\n", 0o755),
            directory("replaced"),
            file(f"replaced/file-{number}", "only me\n"),
        )
        commit_layer(sn, work, f"layer-{number}", parent, change)
        change(flat)
        parent = f"layer-{number}"
    with mounted(sn.view("view", parent), work / "view") as top:
        assert contents(top) == contents(flat)
