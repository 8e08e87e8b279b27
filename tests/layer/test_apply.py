"""The tree of a layer against the same tar unpacked on disk by containerd's rules."""

from __future__ import annotations

import os
import time
from contextlib import closing

import pytest
from hypothesis import HealthCheck, event, given, settings

from snapshotter.errors import UnsupportedLayer
from snapshotter.layer import apply
from tests.support import random_layers, unpacking
from tests.support.facts import Facts, deep_root, facts_of_directory, facts_of_tree, tree_of
from tests.support.images import Entry, directory, hardlink, symlink, tar
from tests.support.nasty import BIND_CAPABILITY, Named, nasty_layers, xattr_records

EXAMPLES = int(os.environ.get("RANDOM_LAYERS", "120"))
"""Each takes 20 ms, most of it on the disk; a thorough run sets some thousands."""


def on_disk(data: bytes, *, base: bool) -> dict[bytes, Facts]:
    """Return what unpacking leaves. Raises unpacking.Refused."""
    since_ns = time.time_ns() - 10**9
    with deep_root() as root:
        unpacking.unpack(data, root, base=base)
        return facts_of_directory(root, since_ns=since_ns)


def in_tree(data: bytes, *, base: bool) -> dict[bytes, Facts]:
    """Return what the tree shows. Raises UnsupportedLayer."""
    with closing(tree_of(data, base=base)) as tree:
        return facts_of_tree(tree, data)


def compare(entries: list[Named], *, base: bool) -> int:
    """Compare tree and disk; without the entries that are refused, which must be the same for both.

    Returns how many were refused.
    """
    entries = list(entries)
    refused = 0
    while True:
        data = tar(entries)
        try:
            expected = on_disk(data, base=base)
        except unpacking.Refused as refusal:
            with pytest.raises(UnsupportedLayer):
                in_tree(data, base=base)
            refused += 1
            if refusal.entry < 0:
                return refused
            del entries[refusal.entry]
        else:
            assert in_tree(data, base=base) == expected
            return refused


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_nasty_layers(number: int, base: bool) -> None:
    data = nasty_layers()[number]
    assert in_tree(data, base=base) == on_disk(data, base=base)


@pytest.mark.parametrize("base", [False, True])
@given(entries=random_layers.layers())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_layers(base: bool, entries: list[Named]) -> None:
    event(f"refused {compare(entries, base=base)}")


def both(*entries: Named, base: bool = False) -> dict[bytes, Facts]:
    """Return what the tree of these entries shows, having compared it with the disk."""
    data = tar(entries)
    shown = in_tree(data, base=base)
    assert shown == on_disk(data, base=base)
    return shown


def test_hard_link_entries_change_the_inode_they_share() -> None:
    shown = both(
        ("target", Entry(b"x", mode=0o640, uid=1, mtime=1000)),
        ("link", hardlink("target", uid=2, gid=3, mtime=2000, pax=xattr_records({"user.note": b"late"}))),
    )
    assert shown[b"target"] == shown[b"link"]._replace(same_as=b"link")
    assert (shown[b"link"].mode & 0o7777, shown[b"link"].uid, shown[b"link"].mtime_ns) == (
        0o644,
        2,
        2000 * 10**9,
    )
    assert shown[b"link"].nlink == 2
    assert shown[b"link"].xattrs == ((b"user.note", b"late"),)


def test_a_hard_link_takes_file_capabilities_away_unless_it_brings_its_own() -> None:
    capable = xattr_records({"security.capability": BIND_CAPABILITY, "user.note": b"stays"})
    shown = both(
        ("lost", Entry(b"x", pax=capable)),
        ("lost-link", hardlink("lost")),
        ("kept", Entry(b"x", pax=capable)),
        ("kept-link", hardlink("kept", pax=capable)),
    )
    assert shown[b"lost"].xattrs == ((b"user.note", b"stays"),)
    assert shown[b"kept"].xattrs == ((b"security.capability", BIND_CAPABILITY), (b"user.note", b"stays"))


def test_a_hard_link_to_a_symlink_links_the_symlink_itself() -> None:
    shown = both(("file", b"x"), ("link", symlink("file")), ("hard", hardlink("link", mode=0o600, uid=4)))
    assert shown[b"hard"].content == b"file"
    assert (shown[b"link"].mode, shown[b"link"].uid, shown[b"link"].nlink) == (0o120777, 4, 2)


@pytest.mark.parametrize(
    "link",
    [
        hardlink("nowhere"),  # in no layer, or in a parent layer
        hardlink("directory"),
        hardlink("directory/"),
        hardlink("link"),  # itself: removed first
        hardlink("../.."),
        hardlink("file/below"),
        hardlink("loop/x"),
        hardlink(""),
    ],
    ids=lambda entry: entry.target or "empty",
)
def test_hard_links_that_cannot_be(link: Entry) -> None:
    entries = [
        ("directory/", directory()),
        ("file", b""),
        ("loop", symlink("loop")),
        ("link", b"old"),
        ("link", link),
    ]
    assert compare(entries, base=False) == 1


def test_a_link_name_with_a_trailing_slash_follows_links() -> None:
    shown = both(("file", b"x"), ("soft", symlink("file")), ("hard", hardlink("soft/")))
    assert shown[b"hard"].content == b"x"
    assert shown[b"hard"].nlink == 2


def test_entries_are_written_through_links_bounded_by_the_layer() -> None:
    shown = both(
        ("real/", directory()),
        ("up", symlink("../../../real")),
        ("absolute", symlink("/real")),
        ("chain", symlink("absolute")),
        ("up/a", b"1"),
        ("absolute/b", b"2"),
        ("chain/c", b"3"),
        ("missing", symlink("not/there")),
        ("missing/d", b"4"),
    )
    assert {path for path in shown if path.startswith(b"real/")} == {b"real/a", b"real/b", b"real/c"}
    assert shown[b"not/there/d"].content == b"4"


def test_what_the_kernel_follows_and_containerd_joins() -> None:
    """A link to a link is joined lexically before the kernel has a say; out of the layer there is nothing."""
    for way in ("d/c", "/d/c", "../d/c"):
        shown = both(
            ("d/c/", directory()),
            ("d/c/x", symlink("../q")),
            ("b", symlink(way)),
            ("a", symlink("b")),
            ("a/x/f", b""),
        )
        assert (b"q/f" if way == "d/c" else b"d/q/f") in shown


def test_a_relative_name_and_an_absolute_one_may_differ() -> None:
    links = [("z/w/", directory()), ("x", symlink("z/w")), ("l", symlink("x/../y"))]
    assert b"z/y/f" in both(*links, ("l/f", b""))
    assert b"y/f" in both(*links, ("/l/f", b""))


def test_the_meaning_of_a_parent_changes_when_a_link_replaces_it() -> None:
    shown = both(
        ("one/", directory()),
        ("two/", directory()),
        ("way/file", b"implicit"),
        ("way", symlink("one")),
        ("way/file", b"1"),
        ("way", symlink("two")),
        ("way/file", b"2"),
    )
    assert (shown[b"one/file"].content, shown[b"two/file"].content) == (b"1", b"2")


def test_a_repeated_directory_keeps_children_and_adds_attributes() -> None:
    shown = both(
        ("d/", directory(0o700, pax=xattr_records({"user.a": b"1", "user.b": b"1"}))),
        ("d/child", b""),
        ("d/", directory(0o755, uid=3, pax=xattr_records({"user.b": b"2"}))),
    )
    assert b"d/child" in shown
    assert (shown[b"d"].mode & 0o7777, shown[b"d"].uid) == (0o755, 3)
    assert shown[b"d"].xattrs == ((b"user.a", b"1"), (b"user.b", b"2"))


def test_directory_times_are_set_at_the_end_on_what_is_there() -> None:
    shown = both(
        ("target", Entry(b"x", mtime=5)),
        ("d/", directory(mtime=1000)),
        ("d", symlink("target", mtime=7)),
    )
    assert shown[b"target"].mtime_ns == 1000 * 10**9
    assert shown[b"d"].mtime_ns == 7 * 10**9


def test_a_directory_that_is_gone_at_the_end_is_refused() -> None:
    assert compare([("d/", directory()), ("d/sub/", directory()), ("d", b"file")], base=False) == 1
    assert compare([("d/", directory()), (".wh.d", b"")], base=True) == 1


def test_set_group_id_directories_hand_their_group_down() -> None:
    keep = 0xFFFFFFFF
    shown = both(
        ("mail/", directory(0o2775, gid=8)),
        ("mail/implied/file", Entry(b"", gid=keep)),
        ("mail/kept", Entry(b"", gid=keep)),
        ("mail/.wh.gone", Entry(gid=keep)),
    )
    assert {shown[path].gid for path in (b"mail/implied", b"mail/kept", b"mail/gone")} == {8}
    assert shown[b"mail/implied"].mode & 0o7777 == 0o755


def test_whiteouts_and_opaque_markers_for_an_overlay() -> None:
    shown = both(
        ("d/sub/old", b""),
        ("d/.wh..wh..opq", b""),
        ("d/.wh.gone", Entry(uid=3, gid=4)),
        ("d/.wh..wh.plnk", b""),
        (".wh.back", b""),
        ("back", b"again"),
    )
    assert shown[b"d"].xattrs == ((b"trusted.overlay.opaque", b"y"),)
    assert (shown[b"d/gone"].mode, shown[b"d/gone"].uid, shown[b"d/gone"].gid) == (0o020000, 3, 4)
    assert shown[b"d/.wh.plnk"].mode == 0o020000
    assert shown[b"back"].content == b"again"
    assert b"d/sub/old" in shown


def test_whiteouts_and_opaque_markers_of_a_base_layer_leave_nothing() -> None:
    shown = both(
        ("gone", b""),
        (".wh.gone", b""),
        ("d/", directory()),
        ("d/kept", b""),
        ("d/implied/lost", b""),
        ("d/sub/", directory()),
        ("d/sub/kept", b""),
        ("d/sub/implied/lost", b""),
        ("d/.wh..wh..opq", b""),
        base=True,
    )
    assert set(shown) == {b"", b"d", b"d/kept", b"d/sub", b"d/sub/kept"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.", "file/.wh.x"])
@pytest.mark.parametrize("base", [False, True])
def test_whiteouts_that_cannot_be(name: str, base: bool) -> None:
    assert compare([("file", b""), (name, b"")], base=base) == 1


def test_a_whiteout_of_what_the_layer_has_is_refused_on_an_overlay() -> None:
    assert compare([("name", b""), (".wh.name", b"")], base=False) == 1


@pytest.mark.parametrize("name", ["./", "/", "..", "a/..", "../", "."])
def test_what_resolves_to_the_root_is_ignored(name: str) -> None:
    shown = both((name, directory(0o700, uid=3, mtime=1000, pax=xattr_records({"user.x": b"1"}))))
    assert list(shown) == [b""]
    assert (shown[b""].mode, shown[b""].uid, shown[b""].mtime_ns, shown[b""].xattrs) == (0o040755, 0, 0, ())


def test_names_as_long_as_the_kernel_takes_them() -> None:
    assert compare([("n" * 255, b""), (".wh." + "w" * 255, b""), ("n/" + "m" * 255, b"")], base=False) == 0
    assert compare([("n" * 256, b"")], base=False) == 1
    assert compare([("m" * 256 + "/below", b"")], base=False) == 1
    assert compare([(".wh." + "w" * 256, b"")], base=False) == 1
    assert compare([("link", symlink("t" * 4095))], base=False) == 0
    assert compare([("link", symlink("t" * 4096))], base=False) == 1
    assert compare([("link", symlink(""))], base=False) == 1
    assert compare([("/".join(["d" * 200] * 25), b"")], base=False) == 1


def test_as_many_links_as_containerd_follows() -> None:
    def chain(length: int) -> list[Named]:
        links: list[Named] = [(f"l{i}", symlink(f"/l{i + 1}")) for i in range(length)]
        return [*links, ("l0/file", b"")]

    assert compare(chain(255), base=False) == 0
    assert compare(chain(257), base=False) == 1


def test_more_files_than_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_MAX_INODES", 6)
    four: list[Named] = [(name, b"") for name in ("a", "b", "c", "d")]
    assert len(both(*four)) == 5
    assert "at most 6 files" in refusal(*four, ("e", b""))
    assert "more than 6 files" in refusal(*four[:2], ("e/f/g/h", b""))


def refusal(*entries: Named) -> str:
    """Return why these entries are refused, by us alone."""
    with pytest.raises(UnsupportedLayer) as caught:
        in_tree(tar(entries), base=False)
    return str(caught.value)


def test_a_refusal_names_the_entry() -> None:
    assert refusal(("first", b""), ("sec\nond", hardlink("no"))) == (
        r"tar entry 'sec\nond': hard link to 'no', which is not in this layer"
    )
    assert len(refusal(("n" * 3000, b""))) < 300


def test_sparse_files_are_refused() -> None:
    assert "sparse" in refusal(
        ("holes", Entry(b"1\n0\n1\n".ljust(512, b"\0"), pax={"GNU.sparse.name": "holes"}))
    )


def test_posix_acls_are_refused() -> None:
    acl = xattr_records({"system.posix_acl_access": b"\2\0\0\0"})
    assert "POSIX ACL" in refusal(("file", Entry(b"", pax=acl)))
