"""Descriptors and platforms: JSON in Go's order, and one error for each broken field."""

from typing import Any

import pytest

from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import go_json
from snapshotter.units import Digest

DIGEST = Digest("sha256:" + "ab" * 32)
FULL = {
    "mediaType": "application/x",
    "digest": DIGEST,
    "size": 7,
    "urls": ["https://a.example/"],
    "annotations": {"a": "1", "b": "2"},
    "data": "e30=",
    "platform": {
        "architecture": "arm",
        "os": "windows",
        "os.version": "10.0",
        "os.features": ["win32k"],
        "variant": "v7",
    },
    "artifactType": "application/y",
}


def test_all_fields_come_back_in_the_same_order() -> None:
    assert go_json(Descriptor.from_json(FULL).to_json()) == go_json(FULL)


def test_annotations_are_sorted_when_written() -> None:
    descriptor = Descriptor("t", DIGEST, 1, annotations={"b": "2", "a": "1", "B": "3"})
    assert list(descriptor.to_json()["annotations"]) == ["B", "a", "b"]


def test_empty_optional_fields_are_left_out() -> None:
    obj: dict[str, Any] = {"mediaType": "t", "digest": DIGEST, "size": 0}
    descriptor = Descriptor.from_json(obj | {"annotations": {}, "urls": None, "platform": None, "data": ""})
    assert descriptor.to_json() == obj


def test_a_platform_keeps_its_two_mandatory_fields() -> None:
    assert Platform("", "").to_json() == {"architecture": "", "os": ""}


def test_descriptors_are_hashable_and_equal_by_value() -> None:
    one, other = Descriptor.from_json(FULL), Descriptor.from_json(FULL)
    assert {one} == {other}
    assert one != Descriptor.from_json(FULL | {"annotations": {}})


def test_a_platform_reads_as_people_write_it() -> None:
    assert str(Platform("arm64", "linux", variant="v8")) == "linux/arm64/v8"
    assert str(Platform("amd64", "linux")) == "linux/amd64"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"digest": None}, "layers[0].digest: expected str, found nothing"),
        ({"digest": 5}, "layers[0].digest: expected str, found int"),
        ({"digest": "sha512:" + "ab" * 64}, "layers[0].digest: not a sha256 digest"),
        ({"digest": "sha256:" + "AB" * 32}, "layers[0].digest: not a sha256 digest"),
        ({"digest": DIGEST + "\n"}, "layers[0].digest: not a sha256 digest"),
        ({"size": None}, "layers[0].size: expected int, found nothing"),
        ({"size": True}, "layers[0].size: expected int, found bool"),
        ({"size": 1.5}, "layers[0].size: expected int, found float"),
        ({"size": -1}, "layers[0].size: -1 is not a size"),
        ({"size": 1 << 63}, "layers[0].size: 9223372036854775808 is not a size"),
        ({"mediaType": []}, "layers[0].mediaType: expected str, found list"),
        ({"urls": "x"}, "layers[0].urls: expected list"),
        ({"urls": ["x", 1]}, "layers[0].urls[1]: expected str"),
        ({"annotations": []}, "layers[0].annotations: expected dict"),
        ({"annotations": {"k": 1}}, "layers[0].annotations['k']: expected str"),
        ({"platform": []}, "layers[0].platform: expected dict"),
        ({"platform": {"os": 1}}, "layers[0].platform.os: expected str"),
        ({"platform": {"os.features": [1]}}, "layers[0].platform.os.features[0]: expected str"),
        ({"artifactType": {}}, "layers[0].artifactType: expected str"),
        ({"data": 1}, "layers[0].data: expected str"),
    ],
)
def test_each_broken_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidIndex) as caught:
        Descriptor.from_json(FULL | change, "layers[0]")
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("obj", [None, [], "x", 3])
def test_what_is_no_object_is_no_descriptor(obj: object) -> None:
    with pytest.raises(InvalidIndex, match=r"config: expected dict"):
        Descriptor.from_json(obj, "config")
