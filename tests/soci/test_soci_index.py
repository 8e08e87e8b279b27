"""The SOCI index: golden bytes, and one broken field at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCI_MANIFEST, OCTET_STREAM, SOCI_INDEX_V1, SOCI_INDEX_V2
from snapshotter.soci import index
from snapshotter.soci.index import IndexVersion, LayerZtoc, SociIndex
from snapshotter.units import Digest, sha256_digest

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ["nasty", "small3"]


def a_digest(text: str) -> Digest:
    return sha256_digest(text.encode())


def an_index(version: IndexVersion = IndexVersion.V1) -> SociIndex:
    ztocs = [
        LayerZtoc(a_digest(f"layer {i}"), "application/x", a_digest(f"ztoc {i}"), 100 + i, 1 << 22)
        for i in range(2)
    ]
    subject = Descriptor(OCI_MANIFEST, a_digest("image"), 500, {"dropped": "yes"})
    return index.build(
        version, ztocs, build_tool="<tool> & co", subject=subject if version is IndexVersion.V1 else None
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_indices_are_rebuilt_byte_for_byte(name: str) -> None:
    data = (GOLDEN / f"{name}-soci-index-v1.json").read_bytes()
    parsed = index.parse(data)
    rebuilt = index.build(parsed.version, parsed.ztocs, build_tool=parsed.build_tool, subject=parsed.subject)
    assert rebuilt.data == data
    assert rebuilt == parsed
    assert parsed.build_tool == "AWS SOCI CLI v0.1"
    assert [entry.span_size for entry in parsed.ztocs] == [None, None, None]


def test_golden_index_answers_what_a_mount_asks() -> None:
    parsed = index.parse((GOLDEN / "nasty-soci-index-v1.json").read_bytes())
    assert parsed.version is IndexVersion.V1
    assert parsed.digest == "sha256:eb19343682960b521e086610bf7e90d6a9b344061427247f7b175c920ef46d00"
    assert parsed.subject is not None
    assert parsed.subject.size == 663
    layer = Digest("sha256:691a5f105acbb7c9ee33a8cd175f04ff883da62b3304aa298446a74c79d5fed7")
    ztoc = parsed.ztoc_for(layer)
    assert ztoc is not None
    assert (ztoc.digest[:19], ztoc.size) == ("sha256:4e37792301b2", 716848)
    assert parsed.ztoc_for(a_digest("another layer")) is None


def test_descriptor_is_what_a_referrers_list_holds() -> None:
    built = an_index()
    listed = built.descriptor.to_json()
    assert list(listed) == ["mediaType", "digest", "size", "annotations", "artifactType"]
    assert listed["artifactType"] == SOCI_INDEX_V1
    assert listed["size"] == len(built.data)


def test_v1_bytes_are_compact_escaped_and_in_go_order() -> None:
    data = an_index().data
    obj = json.loads(data)
    assert list(obj) == ["schemaVersion", "mediaType", "config", "layers", "subject", "annotations"]
    assert list(obj["subject"]) == ["mediaType", "digest", "size"]
    assert b'"com.amazon.soci.build-tool-identifier":"\\u003ctool\\u003e \\u0026 co"' in data
    assert obj["layers"][0]["annotations"]["com.amazon.soci.span-size"] == "4194304"
    assert b" " not in data.replace(b" \\u0026 co", b"")


def test_v2_has_no_subject() -> None:
    built = an_index(IndexVersion.V2)
    assert built.version is IndexVersion.V2
    assert built.subject is None
    assert "subject" not in json.loads(built.data)
    assert json.loads(built.data)["config"]["mediaType"] == SOCI_INDEX_V2


def test_bytes_are_kept_verbatim() -> None:
    data = json.dumps(json.loads(an_index().data) | {"unknown": 1}, indent=2).encode()
    parsed = index.parse(data)
    assert parsed.data == data
    assert parsed.digest == sha256_digest(data)


def test_disable_xattrs_survives() -> None:
    entry = LayerZtoc(a_digest("l"), "t", a_digest("z"), 1, 4096, disable_xattrs=True)
    built = index.build(IndexVersion.V2, [entry], build_tool="tool")
    assert built.ztocs == (entry,)
    annotations = json.loads(built.data)["layers"][0]["annotations"]
    assert list(annotations) == sorted(annotations)
    assert annotations["com.amazon.soci.disable-xattrs"] == "true"


def test_prefetch_artifacts_are_kept_apart_from_ztocs() -> None:
    obj = json.loads(an_index().data)
    prefetch = {
        "mediaType": "application/vnd.amazon.soci.prefetch.v1+json",
        "digest": a_digest("prefetch"),
        "size": 90,
        "annotations": {"com.amazon.soci.image-layer-digest": a_digest("layer 1")},
    }
    obj["layers"].append(prefetch)
    parsed = index.parse(json.dumps(obj).encode())
    assert len(parsed.ztocs) == 2
    assert [(layer, found.size) for layer, found in parsed.prefetch] == [(a_digest("layer 1"), 90)]


def test_the_same_layer_twice_is_fine_with_one_ztoc() -> None:
    entry = LayerZtoc(a_digest("l"), "t", a_digest("z"), 1, 4096)
    assert len(index.build(IndexVersion.V1, [entry, entry], build_tool="tool").ztocs) == 2


def set_layer(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda obj: obj["layers"][1].__setitem__(field, value)


def set_annotation(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda obj: obj["layers"][1]["annotations"].__setitem__(f"com.amazon.soci.{name}", value)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda obj: obj["config"].update(mediaType=OCTET_STREAM), r"config\.mediaType"),
    "no config": (lambda obj: obj.pop("config"), "config"),
    "a list": (lambda obj: obj.update(manifests=[]), "manifests"),
    "media type": (lambda obj: obj.update(mediaType="text/plain"), "mediaType"),
    "artifact": (set_layer("mediaType", "text/plain"), r"layers\[1\]\.mediaType"),
    "digest": (set_layer("digest", "sha256:00"), r"layers\[1\]\.digest"),
    "size": (set_layer("size", -1), r"layers\[1\]\.size"),
    "no layer": (set_layer("annotations", {}), r"layers\[1\].*image-layer-digest"),
    "layer": (set_annotation("image-layer-digest", "sha512:00"), r"layers\[1\].*image-layer-digest"),
    "span size": (set_annotation("span-size", "-4"), r"layers\[1\].*span-size"),
    "huge span size": (set_annotation("span-size", "9" * 5000), r"layers\[1\].*span-size"),
    "two answers": (
        set_annotation("image-layer-digest", a_digest("layer 0")),
        f"two different zTOCs for layer {a_digest('layer 0')}",
    ),
    "subject": (lambda obj: obj.update(subject=[]), "subject"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_broken_field_is_named(case: str) -> None:
    damage, message = BROKEN[case]
    obj = json.loads(an_index().data)
    damage(obj)
    with pytest.raises(InvalidIndex, match=message):
        index.parse(json.dumps(obj).encode())


def test_every_truncation_is_refused() -> None:
    data = an_index().data
    for end in range(len(data)):
        with pytest.raises(InvalidIndex):
            index.parse(data[:end])
    with pytest.raises(InvalidIndex):
        index.parse(data + b"}")


digests = st.binary(min_size=1, max_size=8).map(sha256_digest)
entries = st.builds(
    LayerZtoc,
    layer=digests,
    layer_media_type=st.text(max_size=20),
    ztoc=digests,
    ztoc_size=st.integers(0, 2**63 - 1),
    span_size=st.none() | st.integers(0, 2**62),
    disable_xattrs=st.booleans(),
)


@given(
    ztocs=st.lists(entries, max_size=5, unique_by=lambda entry: entry.layer),
    build_tool=st.text(max_size=30),
    version=st.sampled_from(IndexVersion),
)
def test_what_was_built_is_what_is_read(
    ztocs: list[LayerZtoc], build_tool: str, version: IndexVersion
) -> None:
    built = index.build(version, ztocs, build_tool=build_tool)
    assert built.ztocs == tuple(ztocs)
    assert (built.version, built.build_tool) == (version, build_tool)
    assert index.parse(built.data) == built
    again = index.build(built.version, built.ztocs, build_tool=built.build_tool)
    assert again.digest == built.digest


@given(position=st.integers(0, 1500), value=st.integers(0, 255), cut=st.booleans())
def test_damage_gives_an_index_or_the_one_error(position: int, value: int, cut: bool) -> None:
    data = bytearray((GOLDEN / "nasty-soci-index-v1.json").read_bytes())
    data[position] = value
    if cut:
        del data[position:]
    try:
        parsed = index.parse(bytes(data))
    except InvalidIndex:
        return
    assert parsed.data == bytes(data)
    assert len(parsed.ztocs) <= 3


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text(), st.lists).map(lambda obj: json.dumps(obj).encode())
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidIndex):
        index.parse(data)
