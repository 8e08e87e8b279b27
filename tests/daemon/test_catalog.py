"""What is known of images: for how long, and over restarts."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter.daemon.catalog import Catalog
from snapshotter.daemon.discovery import Modes
from snapshotter.daemon.phases import Phases
from snapshotter.errors import NoIndex, RegistryUnavailable
from snapshotter.soci.index import IndexVersion
from snapshotter.units import Digest, digest_hex
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.indexed import IndexedImage, make_index, publish, put_index
from tests.support.lazylayer import make_tar
from tests.support.registry import Registry, Status
from tests.support.registry_clients import ONCE, client_for

BOTH = Modes(v1=True, v2=True)
TARS = [make_tar({"a": b"A" * 1000})]


@pytest.fixture
def image(registry: Registry) -> IndexedImage:
    return publish(registry, TARS)


Test = Callable[[Catalog, trio.testing.MockClock], Awaitable[None]]


def catalogued(root: Path, registry: Registry, test: Test, modes: Modes = BOTH) -> None:
    """Run `test` with a new catalog on `root`, as a daemon that was just started; its clock stands still."""
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with client_for(registry, retry=ONCE) as client, background() as nursery:
            await test(Catalog(root, client, modes, nursery, Phases()), clock)

    trio.run(main, clock=clock)


def directory_of(root: Path, image: IndexedImage) -> Path:
    return root / "images" / digest_hex(image.image.digest)


def resolved(
    root: Path, image: IndexedImage, modes: Modes = BOTH, explicit: Digest | None = None
) -> tuple[Digest, str]:
    """Return digest and origin of the index that a new catalog on `root` finds."""
    got = []

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        found = await catalog.resolve(image.reference, explicit)
        got.append((found.index.digest, found.how))

    catalogued(root, image.registry, test, modes)
    return got[0]


# --- what stays on disk


def test_what_nothing_uses_goes_when_it_is_no_longer_young(tmp_path: Path, registry: Registry) -> None:
    used, unused, young = (
        publish(registry, [make_tar({"name": name.encode()})]) for name in ("used", "unused", "young")
    )
    for image in (used, unused, young):
        resolved(tmp_path, image)
    for image in (used, unused):
        os.utime(directory_of(tmp_path, image), (1e9, 1e9))

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        catalog.tidy({str(used.image.digest)})

    catalogued(tmp_path, registry, test)
    assert [directory_of(tmp_path, image).exists() for image in (used, unused, young)] == [True, False, True]


# --- within one life


def test_an_image_is_resolved_once(tmp_path: Path, image: IndexedImage) -> None:
    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        first = await catalog.resolve(image.reference, None)
        image.registry.clear_requests()
        clock.jump(1e6)
        assert await catalog.resolve(image.reference, None) is first
        assert image.registry.requests == []

    catalogued(tmp_path, image.registry, test)


def test_all_layers_of_an_image_ask_together_and_once(tmp_path: Path, image: IndexedImage) -> None:
    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(catalog.resolve, image.reference, None)
        assert image.registry.count(path=f"/manifests/{image.image.digest}") == 1

    catalogued(tmp_path, image.registry, test)


def test_no_index_is_remembered_for_a_moment_only(tmp_path: Path, registry: Registry) -> None:
    image = publish(registry, TARS, version=None)

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        with pytest.raises(NoIndex):
            await catalog.resolve(image.reference, None)
        index = image.add_v1()
        registry.clear_requests()
        clock.jump(29)
        with pytest.raises(NoIndex):
            await catalog.resolve(image.reference, None)
        assert registry.requests == []
        clock.jump(2)
        assert (await catalog.resolve(image.reference, None)).index.digest == index.digest

    catalogued(tmp_path, registry, test)


def test_a_failure_is_remembered_for_less(tmp_path: Path, image: IndexedImage) -> None:
    registry = image.registry
    registry.fault(Status(status=403, path="/referrers/", count=-1))

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        with pytest.raises(Exception, match="403"):
            await catalog.resolve(image.reference, None)
        registry.clear_faults()
        registry.clear_requests()
        clock.jump(1.5)
        with pytest.raises(Exception, match="403"):
            await catalog.resolve(image.reference, None)
        assert registry.requests == []
        clock.jump(1)
        assert (await catalog.resolve(image.reference, None)).how == "v1"

    catalogued(tmp_path, registry, test)


def test_what_failed_for_one_image_holds_for_that_one_only(tmp_path: Path, registry: Registry) -> None:
    without, with_index = publish(registry, TARS, version=None), publish(registry, TARS, repository="other")

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        with pytest.raises(NoIndex):
            await catalog.resolve(without.reference, None)
        assert (await catalog.resolve(with_index.reference, None)).how == "v1"

    catalogued(tmp_path, registry, test)


def test_a_named_index_and_the_found_one_are_two_answers(tmp_path: Path, image: IndexedImage) -> None:
    named = make_index(image.layers, version=IndexVersion.V2, tool="named")
    put_index(image.registry, "app", named, image.layers)

    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        for _round in range(2):
            assert (await catalog.resolve(image.reference, None)).how == "v1"
            assert (await catalog.resolve(image.reference, named.digest)).index.digest == named.digest

    catalogued(tmp_path, image.registry, test)


def test_who_gives_up_waiting_does_not_stop_the_search(tmp_path: Path, image: IndexedImage) -> None:
    async def test(catalog: Catalog, clock: trio.testing.MockClock) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await catalog.resolve(image.reference, None)
        assert (await catalog.resolve(image.reference, None)).how == "v1"
        assert image.registry.count(path=f"/manifests/{image.image.digest}") == 1

    catalogued(tmp_path, image.registry, test)


# --- over restarts


@pytest.mark.parametrize("version", [IndexVersion.V1, IndexVersion.V2])
def test_a_restart_needs_no_network(tmp_path: Path, registry: Registry, version: IndexVersion) -> None:
    image = publish(registry, TARS, version=version)
    first = resolved(tmp_path, image)
    registry.clear_requests()
    registry.fault(Status(status=500, count=-1))
    assert resolved(tmp_path, image) == first == (image.indices[0].digest, version.name.lower())
    assert registry.requests == []


def damage(path: Path, kind: str) -> None:
    """Damage a file, or take it away."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    match kind:
        case "gone":
            path.unlink()
        case "flipped":
            path.write_bytes(data)
        case "empty":
            path.write_bytes(b"")
        case "rubbish":
            path.write_bytes(b"__doc__" if path.name == "found" else b"\xff{[" * 100)


@pytest.mark.parametrize("name", ["manifest", "index", "found"])
def test_damaged_files_are_found_again(tmp_path: Path, image: IndexedImage, name: str) -> None:
    registry = image.registry

    async def main() -> None:
        async with client_for(registry, retry=ONCE) as client, background() as nursery:
            first = await Catalog(tmp_path, client, BOTH, nursery, Phases()).resolve(image.reference, None)
            for kind in ("gone", "flipped", "empty", "rubbish"):
                (path,) = directory_of(tmp_path, image).glob(f"{name}*")
                damage(path, kind)
                registry.clear_requests()
                assert (
                    await Catalog(tmp_path, client, BOTH, nursery, Phases()).resolve(image.reference, None)
                    == first
                )
                assert registry.requests != [], kind
                registry.clear_requests()  # and now it is whole again
                assert (
                    await Catalog(tmp_path, client, BOTH, nursery, Phases()).resolve(image.reference, None)
                    == first
                )
                assert registry.requests == [], kind

    trio.run(main)


def test_an_index_found_by_a_mode_that_is_now_off_is_not_used(tmp_path: Path, registry: Registry) -> None:
    image = publish(registry, TARS, version=IndexVersion.V2)
    v1 = image.add_v1()
    assert resolved(tmp_path, image)[1] == "v2"
    assert resolved(tmp_path, image, Modes(v1=True, v2=False)) == (v1.digest, "v1")
    with pytest.raises(NoIndex):
        resolved(tmp_path, image, Modes(v1=False, v2=False))


def test_a_named_index_is_kept_for_those_who_name_it(tmp_path: Path, image: IndexedImage) -> None:
    named = make_index(image.layers, version=IndexVersion.V2, tool="named")
    put_index(image.registry, "app", named, image.layers)
    assert resolved(tmp_path, image, explicit=named.digest) == (named.digest, "explicit")
    assert resolved(tmp_path, image) == (image.indices[0].digest, "v1")
    image.registry.fault(Status(status=500, count=-1))
    assert resolved(tmp_path, image, explicit=image.indices[0].digest) == (
        image.indices[0].digest,
        "explicit",
    )
    with pytest.raises(RegistryUnavailable):
        resolved(tmp_path, image, explicit=named.digest)  # only one is kept


def test_only_one_index_of_an_image_stays_on_disk(tmp_path: Path, image: IndexedImage) -> None:
    newer = make_index(image.layers, version=IndexVersion.V2, tool="newer")
    put_index(image.registry, "app", newer, image.layers)
    resolved(tmp_path, image)
    resolved(tmp_path, image, explicit=newer.digest)
    names = sorted(path.name for path in directory_of(tmp_path, image).iterdir())
    assert names == ["found", f"index-{digest_hex(newer.digest)}", "manifest"]


def test_a_crash_while_storing_leaves_nothing_that_counts(
    tmp_path: Path, image: IndexedImage, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    """Whatever is on disk then: it is not the new index under the old origin, nor the other way round."""
    expected_logs.allow("could not be stored")
    named = make_index(image.layers, version=IndexVersion.V2, tool="named")
    put_index(image.registry, "app", named, image.layers)
    resolved(tmp_path, image)

    def replace(source: Path, target: Path) -> None:
        if target.name == "found":
            raise OSError("the power is gone")
        source.rename(target)

    monkeypatch.setattr("snapshotter.daemon.catalog.os.replace", replace)
    resolved(tmp_path, image, explicit=named.digest)
    monkeypatch.undo()
    assert resolved(tmp_path, image) == (image.indices[0].digest, "v1")


def test_a_disk_that_refuses_costs_nothing_now(
    tmp_path: Path, image: IndexedImage, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("could not be stored")
    (tmp_path / "images").mkdir()
    directory_of(tmp_path, image).write_text("a file in the way")
    assert resolved(tmp_path, image)[1] == "v1"


def test_what_is_stored_is_private(tmp_path: Path, image: IndexedImage) -> None:
    resolved(tmp_path, image)
    assert directory_of(tmp_path, image).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o700
