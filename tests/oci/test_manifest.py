"""Manifests, indices and configs: golden bytes, every refusal, and any mutation of a valid one."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidIndex
from snapshotter.oci.manifest import (
    MAX_MANIFEST_SIZE,
    ImageConfig,
    ImageIndex,
    ImageManifest,
    go_json,
    parse,
    parse_config,
)
from snapshotter.oci.media_types import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    EMPTY_JSON,
    EMPTY_JSON_DIGEST,
    OCI_INDEX,
    OCI_MANIFEST,
    SOCI_INDEX_V1,
)
from snapshotter.units import sha256_digest

GOLDEN = Path(__file__).parent / "golden"
SOCI_INDEX = (GOLDEN / "nasty-soci-index-v1.json").read_bytes()
IMAGE = (GOLDEN / "nasty-image-manifest.json").read_bytes()
REFERRERS = (GOLDEN / "nasty-referrers-tag-index.json").read_bytes()
DESCRIPTOR = {"mediaType": "t", "digest": EMPTY_JSON_DIGEST, "size": 2}
MANIFEST = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": DESCRIPTOR, "layers": [DESCRIPTOR]}
INDEX = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [DESCRIPTOR]}


def encoded(obj: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({key: value for key, value in (obj | changes).items() if value is not ...}).encode()


@pytest.mark.parametrize("golden", [SOCI_INDEX, REFERRERS])
def test_what_the_reference_wrote_is_written_again_byte_for_byte(golden: bytes) -> None:
    assert go_json(parse(golden).to_json()) == golden


def test_a_soci_index_is_read_completely() -> None:
    index = parse(SOCI_INDEX)
    assert isinstance(index, ImageManifest)
    assert index.config.media_type == SOCI_INDEX_V1
    assert [layer.annotations["com.amazon.soci.image-layer-digest"][7:11] for layer in index.layers] == [
        "5007",
        "691a",
        "5623",
    ]
    assert index.subject is not None
    assert index.subject.size == len(IMAGE)
    assert index.annotations == {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.1"}


def test_an_image_manifest_without_a_media_type_is_an_oci_manifest() -> None:
    manifest = parse(IMAGE)
    assert isinstance(manifest, ImageManifest)
    assert manifest.media_type == OCI_MANIFEST
    assert len(manifest.layers) == 3
    assert manifest.subject is None


def test_an_index_is_told_from_a_manifest_by_its_members() -> None:
    index = parse(encoded(INDEX, mediaType=...))
    assert isinstance(index, ImageIndex)
    assert index.media_type == OCI_INDEX


@pytest.mark.parametrize(
    ("obj", "media_type", "kind"),
    [(MANIFEST, DOCKER_MANIFEST, ImageManifest), (INDEX, DOCKER_LIST, ImageIndex)],
)
def test_the_senders_word_counts_where_the_content_has_none(
    obj: dict[str, Any], media_type: str, kind: type
) -> None:
    parsed = parse(encoded(obj, mediaType=...), media_type)
    assert isinstance(parsed, kind)
    assert parsed.media_type == media_type


def test_members_are_written_in_gos_order() -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": EMPTY_JSON_DIGEST, "size": 2}
    extra = {"annotations": {"b": "<", "a": "1"}, "subject": subject, "artifactType": "x"}
    manifest, index = parse(encoded(MANIFEST, **extra)).to_json(), parse(encoded(INDEX, **extra)).to_json()
    head = ["schemaVersion", "mediaType", "artifactType"]
    assert list(manifest) == [*head, "config", "layers", "subject", "annotations"]
    assert list(index) == [*head, "manifests", "subject", "annotations"]
    assert list(manifest["annotations"]) == ["a", "b"]


def test_a_manifest_without_a_media_type_can_be_written() -> None:
    manifest = parse(IMAGE)
    assert go_json(dataclasses.replace(manifest, media_type="").to_json()) + b"\n" == IMAGE


@pytest.mark.parametrize(
    ("data", "announced", "said"),
    [
        (encoded(MANIFEST, schemaVersion=1), None, "schemaVersion: only version 2"),
        (encoded(MANIFEST, schemaVersion="2"), None, "schemaVersion: expected int"),
        (encoded(MANIFEST, mediaType="text/html"), None, "'text/html' is neither"),
        (encoded(MANIFEST, mediaType=...), "text/html", "'text/html' is neither"),
        (encoded(MANIFEST), DOCKER_MANIFEST, "but it was announced as"),
        (encoded(MANIFEST, mediaType=5), None, "mediaType: expected str"),
        (encoded(MANIFEST, manifests=[]), None, "with member 'manifests'"),
        (encoded(INDEX, layers=[]), None, "with member 'layers'"),
        (encoded(INDEX, config=DESCRIPTOR), None, "with member 'config'"),
        (encoded(MANIFEST, mediaType=..., manifests=[]), None, "with member 'config'"),
        (encoded(MANIFEST, config=...), None, "config: expected dict, found nothing"),
        (encoded(MANIFEST, layers={}), None, "layers: expected list"),
        (encoded(MANIFEST, layers=[DESCRIPTOR, {}]), None, r"layers\[1\].digest"),
        (encoded(INDEX, manifests=[5]), None, r"manifests\[0\]: expected dict"),
        (encoded(MANIFEST, subject=[]), None, "subject: expected dict"),
        (encoded(MANIFEST, annotations={"a": 1}), None, "annotations"),
        (b"x" * (MAX_MANIFEST_SIZE + 1), None, "more than the 4194304 allowed"),
        (b"null", None, "not a JSON object"),
    ],
)
def test_each_refusal_says_what_is_wrong(data: bytes, announced: str | None, said: str) -> None:
    with pytest.raises(InvalidIndex, match=said):
        parse(data, announced)


@given(position=st.integers(0, len(SOCI_INDEX) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_gives_a_manifest_or_invalid_index(position: int, byte: int, cut: bool) -> None:
    damaged = SOCI_INDEX[:position] + (b"" if cut else bytes([byte]) + SOCI_INDEX[position + 1 :])
    with contextlib.suppress(InvalidIndex):
        assert isinstance(parse(damaged), ImageManifest | ImageIndex)


def test_a_config_gives_its_diff_ids_lowest_layer_first() -> None:
    digests = [sha256_digest(b"1"), sha256_digest(b"2")]
    obj = {
        "architecture": "arm",
        "os": "linux",
        "variant": "v7",
        "rootfs": {"type": "layers", "diff_ids": digests},
    }
    assert parse_config(encoded(obj)) == ImageConfig("arm", "linux", "v7", tuple(digests))


def test_a_config_of_an_artifact_is_empty() -> None:
    assert parse_config(EMPTY_JSON) == ImageConfig("", "", "", ())
    assert sha256_digest(EMPTY_JSON) == EMPTY_JSON_DIGEST


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ({"rootfs": []}, "config.rootfs: expected dict"),
        ({"rootfs": {"diff_ids": {}}}, "config.rootfs.diff_ids: expected list"),
        ({"rootfs": {"diff_ids": [1]}}, r"config.rootfs.diff_ids\[0\]: expected str"),
        ({"rootfs": {"diff_ids": ["md5:1"]}}, r"config.rootfs.diff_ids\[0\]: not a sha256 digest"),
        ({"os": 1}, "config.os: expected str"),
    ],
)
def test_each_broken_field_of_a_config_is_named(obj: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidIndex, match=said):
        parse_config(encoded(obj))
