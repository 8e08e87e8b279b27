"""Cache files that are deleted or cut off, while nobody looks or under us: noticed, made again, never a wrong byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshotter.layer.spans import SpanState
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, Server, make_layer
from tests.support.registry import Registry

NAMES = ("blob", "data", "spans")
AGAIN = "cache files of a layer were deleted"


@pytest.fixture(params=["gzip", "uncompressed"])
def layer(request: pytest.FixtureRequest, rig: Rig) -> Layer:
    return rig.add(make_layer(compression=request.param))


def read_everything(server: Server, layer: Layer) -> None:
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)


def path_of(rig: Rig, layer: Layer, name: str) -> Path:
    path: Path = getattr(rig.store.paths(layer.digest), name)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_deleted_between_two_fetchers(rig: Rig, registry: Registry, layer: Layer, name: str) -> None:
    read_everything(rig.connect(layer), layer)
    rig.stop()
    path_of(rig, layer, name).unlink()
    registry.clear_requests()
    rig.start()
    rig.open(layer)
    read_everything(rig.connect(layer), layer)
    if name != "blob":
        assert rig.ranges() == [], "what is in the blob is not fetched again"


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_between_two_fetchers(rig: Rig, layer: Layer, name: str) -> None:
    read_everything(rig.connect(layer), layer)
    rig.stop()
    path = path_of(rig, layer, name)
    os.truncate(path, path.stat().st_size // 2)
    rig.start()
    rig.open(layer)
    read_everything(rig.connect(layer), layer)


def test_what_was_verified_is_so_again_without_the_network(
    rig: Rig, registry: Registry, layer: Layer
) -> None:
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    rig.stop()
    for name in ("data", "spans"):
        path_of(rig, layer, name).unlink()
    registry.clear_requests()
    rig.completions.clear()
    rig.questions.clear()
    rig.start()
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    read_everything(rig.connect(layer), layer)
    assert (rig.ranges(), rig.questions) == ([], [])


@pytest.mark.parametrize("name", NAMES)
def test_deleted_under_an_open_layer(rig: Rig, layer: Layer, name: str, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow(AGAIN)
    rig.open(layer, background=True)
    first = rig.connect(layer)
    for span in range(5):
        assert first.read(span) == layer.content(span)
    rig.wait_verified(layer)
    rig.completions.clear()
    path_of(rig, layer, name).unlink()
    second = rig.connect(layer)
    read_everything(second, layer)
    while first.hear() is not None:
        pass  # it is hung up on, so that it looks at its files
    rig.wait_verified(layer)
    assert rig.count("layers_reopened") == 1
    assert all(path_of(rig, layer, name).exists() for name in NAMES)
    read_everything(rig.connect(layer), layer)
    assert rig.count("layers_reopened") == 1


def test_servers_that_have_the_old_files_see_no_new_claim(
    rig: Rig, layer: Layer, expected_logs: ExpectedLogs
) -> None:
    """`data` alone is gone: the span file that its readers have mapped is left as it was, with the data they have."""
    expected_logs.allow(AGAIN)
    server = rig.connect(layer)
    assert server.read(1) == layer.content(1)
    with path_of(rig, layer, "spans").open("rb") as file:
        path_of(rig, layer, "data").unlink()
        read_everything(rig.connect(layer), layer)
        after = file.read()
    states = [after[4096 + 16 * span] for span in range(len(layer.spans))]
    assert states[1] == SpanState.INFLATED
    assert states[-1] == SpanState.MISSING
