"""Finding an image's SOCI index: every way it is linked, and every way a registry can get it wrong."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest

from snapshotter.daemon.discovery import Found, Modes, find_index
from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    DigestMismatch,
    InvalidIndex,
    NoIndex,
    RegistryRefused,
    RegistryUnavailable,
)
from snapshotter.oci.manifest import go_json
from snapshotter.oci.media_types import OCI_INDEX, OCI_MANIFEST
from snapshotter.oci.reference import Reference
from snapshotter.soci.index import INDEX_DIGEST, IndexVersion
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.support.indexed import IndexedImage, make_index, make_indexed_layer, publish, put_index
from tests.support.lazylayer import make_tar
from tests.support.registry import Bearer as BearerAuth
from tests.support.registry import Drop, FlipByte, NoAuth, ReferrersOptions, Registry, Status
from tests.support.registry_clients import failure, run

BOTH = Modes(v1=True, v2=True)
ONLY_V1 = Modes(v1=True, v2=False)
ONLY_V2 = Modes(v1=False, v2=True)
NEITHER = Modes(v1=False, v2=False)
TARS = [make_tar({"a": b"A" * 1000}), make_tar({"b": b"B" * 1000})]
NOWHERE = Digest("sha256:" + "e" * 64)


def find(
    image: IndexedImage,
    modes: Modes = BOTH,
    *,
    explicit: Digest | None = None,
    reference: Reference | None = None,
) -> Found:
    where = reference or image.reference
    return run(image.registry, lambda client: find_index(client, where, explicit=explicit, modes=modes))


def annotated(registry: Registry, image: IndexedImage, value: str) -> Reference:
    """Store a copy of the image's manifest whose v2 annotation is `value`."""
    obj = json.loads(image.image.manifest) | {"annotations": {INDEX_DIGEST: value}}
    digest = registry.add_manifest(go_json(obj))
    return image.reference.with_digest(digest)


def asked(registry: Registry) -> list[str]:
    """Return which documents were asked for, by their kind or the head of their digest."""
    return [request.path.rpartition("/v2/app/")[2] for request in registry.requests]


# --- the three ways


def test_the_index_of_the_label_wins_over_all_others(registry: Registry) -> None:
    image = publish(registry, TARS)
    named = make_index(image.layers[:1], version=IndexVersion.V2, tool="named")
    put_index(registry, "app", named, image.layers)
    found = find(image, explicit=named.digest)
    assert (found.index.digest, found.how) == (named.digest, "explicit")
    assert found.manifest_data == image.image.manifest
    assert not any("referrers" in path for path in asked(registry))


def test_the_index_of_the_label_is_used_with_both_modes_off(registry: Registry) -> None:
    image = publish(registry, TARS)
    assert find(image, NEITHER, explicit=image.indices[0].digest).how == "explicit"


def test_the_v2_annotation_comes_before_v1_and_costs_no_referrers(registry: Registry) -> None:
    image = publish(registry, TARS, version=IndexVersion.V2)
    image.add_v1()
    found = find(image)
    assert (found.index.digest, found.how) == (image.indices[0].digest, "v2")
    assert len(asked(registry)) == 2  # manifest and index


def test_a_mode_that_is_off_is_not_looked_for(registry: Registry) -> None:
    image = publish(registry, TARS, version=IndexVersion.V2)
    v1 = image.add_v1()
    assert find(image, ONLY_V1).index.digest == v1.digest
    assert find(image, ONLY_V2).how == "v2"


def test_with_both_modes_off_the_registry_is_not_asked(registry: Registry) -> None:
    image = publish(registry, TARS)
    with pytest.raises(NoIndex, match="modes are disabled"):
        find(image, NEITHER)
    assert registry.requests == []


def test_only_v2_looked_for_and_not_there(registry: Registry) -> None:
    image = publish(registry, TARS)
    with pytest.raises(NoIndex, match="v1 is disabled"):
        find(image, ONLY_V2)


@pytest.mark.parametrize(
    "options", [ReferrersOptions(), ReferrersOptions(filter=True), ReferrersOptions(page=1)]
)
def test_v1_by_the_referrers_api(options: ReferrersOptions) -> None:
    with Registry(referrers=options) as registry:
        image = publish(registry, TARS)
        found = find(image)
        assert (found.index.digest, found.how) == (image.indices[0].digest, "v1")


def test_v1_by_the_fallback_tag() -> None:
    with Registry(referrers=ReferrersOptions(api=False)) as registry:
        image = publish(registry, TARS)
        listing = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [image.indices[0].descriptor.to_json()],
        }
        registry.add_manifest(
            go_json(listing), OCI_INDEX, tag=image.image.digest.replace(":", "-"), repository="app"
        )
        assert find(image).how == "v1"


@pytest.mark.parametrize("api", [True, False])
def test_an_image_without_referrers_has_no_index(api: bool) -> None:
    with Registry(referrers=ReferrersOptions(api=api)) as registry:
        image = publish(registry, TARS, version=None)
        with pytest.raises(NoIndex, match="0 v1 referrers"):
            find(image)


# --- a v2 annotation that leads nowhere


@pytest.mark.parametrize("value", [NOWHERE, "no digest at all", ""])
def test_a_dangling_annotation_falls_back_to_v1(
    registry: Registry, value: str, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("names a SOCI index that cannot be used")
    image = publish(registry, TARS, version=None)
    image.image = registry.add_image(
        [layer.blob for layer in image.layers], annotations={INDEX_DIGEST: value}
    )
    v1 = image.add_v1()
    found = find(image)
    assert (found.index.digest, found.how) == (v1.digest, "v1")


def test_a_dangling_annotation_without_v1_is_no_index(
    registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("names a SOCI index that cannot be used")
    image = publish(registry, TARS, version=None)
    with pytest.raises(NoIndex):
        find(image, reference=annotated(registry, image, NOWHERE))


def test_an_annotation_that_names_an_image_falls_back_too(
    registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("names a SOCI index that cannot be used")
    image = publish(registry, TARS, version=None)
    with pytest.raises(NoIndex):
        find(image, reference=annotated(registry, image, image.image.digest))


def test_a_v2_index_that_comes_damaged_falls_back_to_v1(
    registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("names a SOCI index that cannot be used")
    image = publish(registry, TARS, version=IndexVersion.V2)
    v1 = image.add_v1()
    registry.fault(FlipByte(path=image.indices[0].digest, at=20, count=-1))
    assert find(image).index.digest == v1.digest


def test_a_registry_that_fails_over_a_v2_index_is_not_taken_for_one_without(registry: Registry) -> None:
    """The fallback is for what is not there; a failure may pass, and then v2 is right."""
    image = publish(registry, TARS, version=IndexVersion.V2)
    image.add_v1()
    registry.fault(Status(path=image.indices[0].digest, status=503, count=-1))
    failure(registry, RegistryUnavailable, partial(find, image))


# --- several v1 indices


def test_of_several_the_newest_is_used_and_the_log_says_which(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    image = publish(registry, TARS, version=None)
    image.add_v1(created="2024-01-01T00:00:00Z", tool="old")
    newest = image.add_v1(created="2026-01-01T00:00:00Z", tool="newest")
    image.add_v1(created="2025-01-01T00:00:00Z", tool="middle")
    with caplog.at_level(logging.INFO, logger="snapshotter"):
        assert find(image).index.digest == newest.digest
    (record,) = [one for one in caplog.records if "several v1" in one.getMessage()]
    assert vars(record)["index"] == newest.digest
    assert vars(record)["candidates"] == 3


def test_without_times_the_last_of_the_list_is_the_newest(registry: Registry) -> None:
    image = publish(registry, TARS, version=None)
    image.add_v1(tool="first")
    last = image.add_v1(tool="second")
    assert find(image).index.digest == last.digest


def test_an_index_of_other_layers_is_passed_over(registry: Registry) -> None:
    image = publish(registry, TARS, version=None)
    right = image.add_v1(image.layers[:1], created="2024-01-01T00:00:00Z")
    foreign = make_indexed_layer(make_tar({"x": b"foreign"}))
    image.add_v1([*image.layers, foreign], created="2026-01-01T00:00:00Z")
    image.add_v1([], created="2027-01-01T00:00:00Z")
    assert find(image).index.digest == right.digest


def test_indices_of_other_layers_alone_are_no_index(registry: Registry) -> None:
    image = publish(registry, TARS, version=None)
    image.add_v1([make_indexed_layer(make_tar({"x": b"foreign"}))])
    with pytest.raises(NoIndex, match="1 v1 referrers, none of them of its layers"):
        find(image)


@pytest.mark.parametrize("fault", [FlipByte(at=20, count=-1), Status(status=404, count=-1)])
def test_a_candidate_that_lies_or_is_gone_is_passed_over(
    registry: Registry, fault: FlipByte | Status, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("v1 SOCI index cannot be used")
    image = publish(registry, TARS, version=None)
    right = image.add_v1(created="2024-01-01T00:00:00Z")
    wrong = image.add_v1(created="2026-01-01T00:00:00Z", tool="wrong")
    fault.path = wrong.digest
    registry.fault(fault)
    assert find(image).index.digest == right.digest


def test_a_newer_candidate_that_cannot_be_asked_for_is_a_registry_error(registry: Registry) -> None:
    image = publish(registry, TARS, version=None)
    image.add_v1(created="2024-01-01T00:00:00Z")
    newest = image.add_v1(created="2026-01-01T00:00:00Z", tool="newest")
    registry.fault(Status(path=newest.digest, status=503, count=-1))
    failure(registry, RegistryUnavailable, partial(find, image))


def test_an_older_candidate_that_cannot_be_asked_for_does_no_harm(registry: Registry) -> None:
    image = publish(registry, TARS, version=None)
    oldest = image.add_v1(created="2024-01-01T00:00:00Z", tool="oldest")
    newest = image.add_v1(created="2026-01-01T00:00:00Z")
    registry.fault(Status(path=oldest.digest, status=503, count=-1))
    assert find(image).index.digest == newest.digest


# --- a registry that lies, refuses or is away


def test_a_manifest_that_comes_damaged_is_a_digest_mismatch(registry: Registry) -> None:
    image = publish(registry, TARS)
    registry.fault(FlipByte(path=image.image.digest, at=30, count=-1))
    failure(registry, DigestMismatch, partial(find, image))


def test_an_index_of_the_label_that_comes_damaged_is_a_digest_mismatch(registry: Registry) -> None:
    image = publish(registry, TARS)
    registry.fault(FlipByte(path=f"manifests/{image.indices[0].digest}", at=30, count=-1))
    failure(registry, DigestMismatch, partial(find, image, explicit=image.indices[0].digest))


def test_an_index_of_the_label_that_is_not_there_is_no_index(registry: Registry) -> None:
    image = publish(registry, TARS)
    with pytest.raises(NoIndex, match=f"{NOWHERE} is not in the registry"):
        find(image, explicit=NOWHERE)


def test_a_label_that_names_an_image_is_an_invalid_index(registry: Registry) -> None:
    image = publish(registry, TARS)
    with pytest.raises(InvalidIndex, match=r"config\.mediaType"):
        find(image, explicit=image.image.digest)


def test_a_list_of_images_is_not_an_image(registry: Registry) -> None:
    image = publish(registry, TARS)
    entry = {"mediaType": OCI_MANIFEST, "digest": image.image.digest, "size": len(image.image.manifest)}
    listing = go_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    reference = image.reference.with_digest(registry.add_manifest(listing, OCI_INDEX))
    with pytest.raises(InvalidIndex, match="is a list of images"):
        find(image, reference=reference)


def test_a_media_type_that_contradicts_the_document_is_refused(registry: Registry) -> None:
    image = publish(registry, TARS)
    registry.add_manifest(image.image.manifest, OCI_INDEX)
    with pytest.raises(InvalidIndex, match="announced as"):
        find(image)


def test_an_image_that_is_not_there_is_a_registry_error(registry: Registry) -> None:
    image = publish(registry, TARS)
    with pytest.raises(BlobNotFound, match=NOWHERE):
        find(image, reference=image.reference.with_digest(NOWHERE))


def test_a_registry_that_is_down(registry: Registry) -> None:
    image = publish(registry, TARS)
    registry.fault(Drop(count=-1))
    failure(registry, RegistryUnavailable, partial(find, image))


def test_referrers_that_cannot_be_asked_for_are_a_registry_error(registry: Registry) -> None:
    image = publish(registry, TARS)
    registry.fault(Status(path="/referrers/", status=500, count=-1))
    failure(registry, RegistryUnavailable, partial(find, image))


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AuthenticationFailed), (403, AuthenticationFailed), (418, RegistryRefused)]
)
def test_a_registry_that_refuses(
    registry: Registry, status: int, kind: type[AuthenticationFailed | RegistryRefused]
) -> None:
    image = publish(registry, TARS)
    registry.fault(Status(status=status, count=-1))
    failure(registry, kind, partial(find, image))


def test_credentials_are_used_for_every_document() -> None:
    with Registry(auth=BearerAuth()) as registry:
        assert isinstance(registry.auth, NoAuth)
        assert find(publish(registry, TARS)).how == "v1"
