"""Blob sources: there and back as JSON, and never shown."""

import json

import pytest

from snapshotter.registry.source import BlobSource

SOURCE = BlobSource(
    url="https://store.example/x?X-Amz-Signature=hidden1",
    headers={"Authorization": "Bearer hidden2"},
    host="store.example",
    what="blob sha256:12 of r.example/app",
)


def test_a_source_crosses_a_socket_as_json() -> None:
    assert BlobSource.from_json(json.loads(json.dumps(SOURCE.to_json()))) == SOURCE


def test_a_source_shows_its_host_and_no_more() -> None:
    for text in (str(SOURCE), repr(SOURCE), f"{SOURCE}", repr([SOURCE])):
        assert "hidden" not in text
        assert "blob sha256:12 of r.example/app at store.example" in text


def test_sources_are_hashable() -> None:
    assert len({SOURCE, BlobSource.from_json(SOURCE.to_json())}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"url": 1},
        {"url": None},
        {"headers": []},
        {"headers": {"hidden3": 1}},
        {"headers": {1: "hidden4"}},
        {"host": b""},
    ],
)
def test_what_is_no_source_is_refused_without_being_shown(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a blob source") as caught:
        BlobSource.from_json(SOURCE.to_json() | change)
    assert "hidden" not in str(caught.value)
