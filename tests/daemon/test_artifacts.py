"""A layer's zTOC and trees: fetched once, compiled once, made again when damaged, and nobody else's."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from snapshotter.daemon.artifacts import MAX_ZTOC_SIZE, ArtifactLimits, LayerArtifacts
from snapshotter.daemon.phases import Phases
from snapshotter.errors import (
    BlobNotFound,
    DigestMismatch,
    InvalidZtoc,
    ProcessFailed,
    RegistryRefused,
    RegistryUnavailable,
    UnsupportedLayer,
)
from snapshotter.fetch import trace
from snapshotter.layer.inherit import Parent
from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.store import LayerStore
from snapshotter.layer.tree import Tree
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.soci.prefetch import Prefetch, SpanRange, write
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.forking import forking
from tests.support.images import directory, tar
from tests.support.indexed import Layer, make_indexed_layer, octets
from tests.support.lazylayer import make_tar
from tests.support.registry import FlipByte, Registry, Status, Truncate
from tests.support.registry_clients import client_for

LIMITS = ArtifactLimits(1 << 30, 30.0)
PLAIN = make_indexed_layer(make_tar({"a": b"A" * 1000}))
pytestmark = pytest.mark.usefixtures("root")


@dataclass
class Rig:
    """What a test has in hand."""

    registry: Registry
    store: LayerStore
    artifacts: LayerArtifacts
    image: Reference

    async def ensure(
        self, layer: Layer, ztoc: Descriptor | None = None, prefetch: Descriptor | None = None
    ) -> None:
        """Have the layer's files made; its zTOC is in the registry."""
        self.registry.add_blob(layer.ztoc)
        await self.artifacts.ensure(self.image, layer.digest, ztoc or layer.descriptor(), prefetch)

    def tree(self, layer: Layer, variant: str = "") -> Tree:
        """Open a tree."""
        with open(self.store.paths(layer.digest, variant).tree, "rb") as file:
            return Tree(file.fileno())

    def fetches(self, layer: Layer) -> int:
        """Return how often the layer's zTOC was asked for."""
        return self.registry.count(path=f"/blobs/{layer.ztoc_digest}")

    def temporaries(self, layer: Layer) -> list[str]:
        """Return what interrupted writes have left."""
        found = self.store.paths(layer.digest).directory
        return [name for name in os.listdir(found) if name.startswith(".")] if found.exists() else []


def with_rig(
    root: Path, registry: Registry, test: Callable[[Rig], Awaitable[None]], limits: ArtifactLimits = LIMITS
) -> None:
    async def main() -> None:
        async with client_for(registry) as client, forking(root) as forker, background() as nursery:
            store = LayerStore(root)
            artifacts = LayerArtifacts(store, client, forker, limits, nursery, Phases())
            await test(Rig(registry, store, artifacts, registry.reference("app", "v1")))

    trio.run(main)


# --- what is fetched first

FIRST = Prefetch(PLAIN.digest, write([SpanRange(0, 0), SpanRange(0, 1 << 40)]))


def test_a_prefetch_artifact_is_the_order_of_a_layer_that_nobody_has_read(
    workdir: Path, registry: Registry
) -> None:
    async def test(rig: Rig) -> None:
        registry.add_blob(FIRST.data)
        await rig.ensure(PLAIN, prefetch=FIRST.descriptor)
        path = rig.store.paths(PLAIN.digest).trace
        assert trace.load(path, 10) == [0], "a span that the layer does not have is none"
        await rig.ensure(PLAIN, prefetch=FIRST.descriptor)
        assert registry.count(path=f"/blobs/{FIRST.descriptor.digest}") == 1

    with_rig(workdir, registry, test, replace(LIMITS, prefetch=True))


@pytest.mark.parametrize("enabled", [False, True], ids=["switched off", "seen better"])
def test_a_prefetch_artifact_that_is_not_wanted_is_not_fetched(
    workdir: Path, registry: Registry, enabled: bool
) -> None:
    async def test(rig: Rig) -> None:
        if enabled:
            await rig.ensure(PLAIN)
            trace.append(rig.store.paths(PLAIN.digest).trace, [0])
        await rig.ensure(PLAIN, prefetch=FIRST.descriptor)
        assert registry.count(path=f"/blobs/{FIRST.descriptor.digest}") == 0
        assert rig.store.paths(PLAIN.digest).trace.exists() == enabled

    with_rig(workdir, registry, test, replace(LIMITS, prefetch=enabled))


@pytest.mark.parametrize("data", [None, b"{}"], ids=["absent", "garbage"])
def test_a_prefetch_artifact_that_is_of_no_use_is_a_line_in_the_log(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs, data: bytes | None
) -> None:
    expected_logs.allow("a prefetch artifact is of no use")
    descriptor = octets(data or b"absent")

    async def test(rig: Rig) -> None:
        if data:
            registry.add_blob(data)
        await rig.ensure(PLAIN, prefetch=descriptor)
        assert not rig.store.paths(PLAIN.digest).trace.exists()

    with_rig(workdir, registry, test, replace(LIMITS, prefetch=True))


# --- the plain case


def test_a_layer_is_fetched_and_compiled_once(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.ensure(PLAIN)  # who gives up waiting does not stop it
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(rig.ensure, PLAIN)
        tree = rig.tree(PLAIN)
        assert tree.ztoc_digest == PLAIN.ztoc_digest
        assert tree.lookup(ROOT_INO, b"a")
        tree.close()
        assert rig.store.paths(PLAIN.digest).ztoc.read_bytes() == PLAIN.ztoc
        made = rig.store.paths(PLAIN.digest).tree.stat().st_ino
        await rig.ensure(PLAIN)
        assert rig.store.paths(PLAIN.digest).tree.stat().st_ino == made
        assert rig.fetches(PLAIN) == 1

    with_rig(workdir, registry, test)


def test_layers_do_not_wait_for_each_other(workdir: Path, registry: Registry) -> None:
    layers = [make_indexed_layer(make_tar({"a": bytes([number])})) for number in range(5)]

    async def test(rig: Rig) -> None:
        async with trio.open_nursery() as nursery:
            for layer in layers:
                nursery.start_soon(rig.ensure, layer)
        assert sorted(rig.store.layers()) == sorted(layer.digest for layer in layers)

    with_rig(workdir, registry, test)


# --- a zTOC that is not what it should be


def test_a_ztoc_that_is_missing_or_lies_leaves_nothing(workdir: Path, registry: Registry) -> None:
    cases = [
        (Status(status=404, count=-1), BlobNotFound),
        (FlipByte(at=100, count=-1), DigestMismatch),
        (Status(status=503, count=-1), RegistryUnavailable),
        (Truncate(after=10, count=-1), None),
    ]

    async def test(rig: Rig) -> None:
        for fault, kind in cases:
            fault.path = PLAIN.ztoc_digest
            registry.fault(fault)
            with pytest.raises(kind or Exception) as info:
                await rig.ensure(PLAIN)
            assert PLAIN.ztoc_digest in str(info.value)
            assert not rig.store.has_ztoc(PLAIN.digest)
            registry.clear_faults()
        await rig.ensure(PLAIN)  # no failure is kept

    with_rig(workdir, registry, test)


def test_a_ztoc_with_the_right_digest_may_still_be_none(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    rubbish = b"not a zTOC" * 100

    async def test(rig: Rig) -> None:
        rig.registry.add_blob(rubbish)
        with pytest.raises(InvalidZtoc, match=PLAIN.digest):
            await rig.ensure(PLAIN, octets(rubbish))
        assert not rig.store.has_tree(PLAIN.digest)
        assert rig.temporaries(PLAIN) == []
        await rig.ensure(PLAIN)  # another index has the right one

    with_rig(workdir, registry, test)


def test_a_ztoc_may_not_be_larger_than_it_says_or_than_any_is(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(RegistryRefused):
            await rig.ensure(PLAIN, replace(PLAIN.descriptor(), size=100))
        with pytest.raises(UnsupportedLayer, match="the limit is"):
            await rig.ensure(PLAIN, replace(PLAIN.descriptor(), size=MAX_ZTOC_SIZE + 1))
        assert rig.fetches(PLAIN) <= 1  # the second was not even asked for

    with_rig(workdir, registry, test)


def test_hostile_ztocs_hit_the_limits(workdir: Path, registry: Registry) -> None:
    """Memory and time are those of the child; the next layer is compiled as if nothing had been."""
    bomb = make_indexed_layer(make_tar({f"{number}/" + "d/" * 1900 + "f": b"" for number in range(100)}))

    async def test(rig: Rig) -> None:
        with pytest.raises(InvalidZtoc, match="limits of memory or time"):
            await rig.ensure(bomb)
        assert not rig.store.has_tree(bomb.digest)
        assert rig.temporaries(bomb) == []
        rig.artifacts._limits = LIMITS
        await rig.ensure(PLAIN)

    with_rig(workdir, registry, test, ArtifactLimits(1 << 30, 0.4))


def test_a_zygote_that_is_away_is_no_fault_of_the_layer(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("zygote ended")
    monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/bin/false")

    async def test(rig: Rig) -> None:
        with pytest.raises(ProcessFailed):
            await rig.ensure(PLAIN)

    with_rig(workdir, registry, test)


# --- files that were there already


def test_damaged_files_are_made_again(workdir: Path, registry: Registry) -> None:
    def damage(path: Path, how: str) -> None:
        data = bytearray(path.read_bytes())
        match how:
            case "short":
                path.write_bytes(data[: len(data) // 2])
            case "empty":
                path.write_bytes(b"")
            case "version":
                data[8] ^= 0xFF
                path.write_bytes(data)
            case "gone":
                path.unlink()

    async def test(rig: Rig) -> None:
        await rig.ensure(PLAIN)
        whole = rig.store.paths(PLAIN.digest).tree.read_bytes()
        for how in ("short", "empty", "version", "gone"):
            damage(rig.store.paths(PLAIN.digest).tree, how)
            await rig.ensure(PLAIN)
            assert rig.store.paths(PLAIN.digest).tree.read_bytes() == whole
        assert rig.fetches(PLAIN) == 1
        for how in ("short", "empty", "version", "gone"):
            damage(rig.store.paths(PLAIN.digest).ztoc, how)
            await rig.ensure(PLAIN)
            assert rig.store.paths(PLAIN.digest).ztoc.read_bytes() == PLAIN.ztoc
        assert rig.fetches(PLAIN) == 5

    with_rig(workdir, registry, test)


def test_a_layer_belongs_to_the_ztoc_it_came_with(workdir: Path, registry: Registry) -> None:
    """An index vouches for its own zTOC and no other, also while the first is being made."""
    other = make_indexed_layer(PLAIN.tar, tool="another builder")
    assert other.digest == PLAIN.digest
    assert other.ztoc_digest != PLAIN.ztoc_digest

    async def test(rig: Rig) -> None:
        refused = []

        async def second() -> None:
            with pytest.raises(UnsupportedLayer, match=f"with zTOC {PLAIN.ztoc_digest}"):
                await rig.ensure(other)
            refused.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.ensure, PLAIN)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(second)
        await second()
        assert len(refused) == 2
        rig.store.paths(PLAIN.digest).tree.write_bytes(b"damaged")
        await second()  # its mounts go on, and need the zTOC they came with
        assert rig.store.paths(PLAIN.digest).ztoc.read_bytes() == PLAIN.ztoc

    with_rig(workdir, registry, test)


# --- variants


WHITEOUTS = make_indexed_layer(tar({"d/": directory(), "d/a": b"A", "d/.wh.a": b"", "d/.wh.b": b""}))
HIDING = make_indexed_layer(tar({"d/": directory(), "d/.wh.b": b""}))
IMPLYING = make_indexed_layer(make_tar({"tmp/x/file": b"F"}))


def names(tree: Tree, ino: int = ROOT_INO) -> list[bytes]:
    return [name for _, name, _ in tree.children(ino)]


def test_the_bottom_layer_resolves_its_whiteouts(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        await rig.ensure(HIDING)
        (workdir / "parent").mkdir()
        assert await rig.artifacts.variant_for(HIDING.digest, [Parent(directory=workdir / "parent")]) == ""
        variant = await rig.artifacts.variant_for(HIDING.digest, [])
        assert variant.startswith("base-")
        for name, expected in (("", [b"b"]), (variant, [])):
            tree = rig.tree(HIDING, name)
            assert names(tree, tree.lookup(ROOT_INO, b"d")) == expected
            tree.close()

    with_rig(workdir, registry, test)


def test_a_plain_layer_has_one_tree_wherever_it_is(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        await rig.ensure(PLAIN)
        (workdir / "parent").mkdir()
        for parents in ([], [Parent(directory=workdir / "parent")]):
            assert await rig.artifacts.variant_for(PLAIN.digest, parents) == ""
        assert sorted(os.listdir(rig.store.paths(PLAIN.digest).directory)) == ["tree", "ztoc"]

    with_rig(workdir, registry, test)


def test_implied_directories_take_over_what_is_below(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        await rig.ensure(IMPLYING)
        variants = set()
        for mode in (0o1777, 0o700, 0o1777):
            parent = workdir / f"parent-{mode:o}"
            (parent / "tmp").mkdir(parents=True, exist_ok=True)
            (parent / "tmp").chmod(mode)
            os.utime(parent / "tmp", (5, 5))
            variant = await rig.artifacts.variant_for(IMPLYING.digest, [Parent(directory=parent)])
            variants.add(variant)
            tree = rig.tree(IMPLYING, variant)
            assert tree.row(tree.lookup(ROOT_INO, b"tmp")).mode == 0o40000 | mode
            tree.close()
        assert len(variants) == 2  # the same case is the same tree

    with_rig(workdir, registry, test)


def test_a_variant_that_is_damaged_is_made_again(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        await rig.ensure(HIDING)
        variant = await rig.artifacts.variant_for(HIDING.digest, [])
        path = rig.store.paths(HIDING.digest, variant).tree
        whole = path.read_bytes()
        path.write_bytes(b"of another version")
        assert await rig.artifacts.variant_for(HIDING.digest, []) == variant
        assert path.read_bytes() == whole

    with_rig(workdir, registry, test)


def test_what_containerd_refuses_is_refused(workdir: Path, registry: Registry) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(UnsupportedLayer, match="whiteout of a name that this layer has"):
            await rig.ensure(WHITEOUTS)

    with_rig(workdir, registry, test)


def test_a_child_may_say_only_what_children_say(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has handled foreign bytes: an error of its own invention is an invalid zTOC."""
    answers = [{"error": "AuthenticationFailed", "message": "m"}, {"error": "__doc__"}, {"error": 7}]

    async def test(rig: Rig) -> None:
        for answer in answers:
            monkeypatch.setattr("snapshotter.daemon.artifacts._answer", lambda _near, answer=answer: answer)
            with pytest.raises(InvalidZtoc):
                await rig.ensure(PLAIN)

    with_rig(workdir, registry, test)
