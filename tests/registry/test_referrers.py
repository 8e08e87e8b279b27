"""Referrers: by the API, in pages, filtered by either side; by the fallback tag, which pushing keeps up."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from snapshotter.errors import BlobNotFound, InvalidIndex, RegistryRefused, RegistryUnavailable, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageIndex, ImageManifest, go_json, parse
from snapshotter.oci.media_types import EMPTY_JSON, EMPTY_JSON_DIGEST, OCI_INDEX, OCI_MANIFEST, SOCI_INDEX_V1
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.referrers import MAX_PAGES, fallback_tag
from snapshotter.units import sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import Bearer, Image, ReferrersOptions, Registry, Status
from tests.support.registry_clients import failure, run

OTHER_TYPE = "application/vnd.example.signature"
API, OLD = ReferrersOptions(), ReferrersOptions(api=False)
GOLDEN = Path(__file__).parents[1] / "oci" / "golden" / "nasty-referrers-tag-index.json"


def start_with_image(start: StartRegistry, **options: Any) -> tuple[Registry, Image]:
    registry = start(**options)
    registry.add_blob(EMPTY_JSON)
    return registry, registry.add_image([b"layer"], diff_ids=[sha256_digest(b"layer")])


def artifact(image: Image, number: int, artifact_type: str = SOCI_INDEX_V1) -> bytes:
    manifest = ImageManifest(
        media_type=OCI_MANIFEST,
        config=Descriptor(artifact_type, EMPTY_JSON_DIGEST, 2),
        layers=(),
        subject=Descriptor(OCI_MANIFEST, image.digest, len(image.manifest)),
        annotations={"number": str(number)},
    )
    return go_json(manifest.to_json())


def put(registry: Registry, image: Image, count: int, artifact_type: str = SOCI_INDEX_V1) -> list[str]:
    return [registry.add_manifest(artifact(image, number, artifact_type)) for number in range(count)]


def find(registry: Registry, image: Image, artifact_type: str = SOCI_INDEX_V1) -> list[str]:
    ref = registry.reference("app", image.digest)
    return [found.digest for found in run(registry, lambda client: client.referrers(ref, artifact_type))]


@pytest.mark.parametrize("filtering", [False, True])
@pytest.mark.parametrize("page", [0, 1, 2, 100])
def test_the_api_lists_what_has_the_type(start: StartRegistry, page: int, filtering: bool) -> None:
    registry, image = start_with_image(
        start, auth=Bearer(), referrers=ReferrersOptions(page=page, filter=filtering)
    )
    put(registry, image, 2, OTHER_TYPE)
    wanted = put(registry, image, 5)
    put(registry, image, 3, OTHER_TYPE)
    assert find(registry, image) == wanted
    assert registry.matching(path="/referrers/")[0].query["artifactType"] == SOCI_INDEX_V1


def test_a_descriptor_of_the_api_is_complete(start: StartRegistry) -> None:
    registry, image = start_with_image(start)
    data = artifact(image, 7)
    registry.add_manifest(data)
    ref = registry.reference("app", image.digest)
    (found,) = run(registry, lambda client: client.referrers(ref, SOCI_INDEX_V1))
    assert found == Descriptor(
        OCI_MANIFEST, sha256_digest(data), len(data), annotations={"number": "7"}, artifact_type=SOCI_INDEX_V1
    )


@pytest.mark.parametrize("options", [API, OLD])
def test_no_referrers_is_an_empty_answer(start: StartRegistry, options: ReferrersOptions) -> None:
    registry, image = start_with_image(start, referrers=options)
    assert find(registry, image) == []


def test_the_fallback_tag_of_the_reference_is_read(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    registry.add_manifest(GOLDEN.read_bytes(), OCI_INDEX, tag=f"sha256-{image.digest[7:]}")
    assert find(registry, image) == [
        "sha256:eb19343682960b521e086610bf7e90d6a9b344061427247f7b175c920ef46d00"
    ]
    assert find(registry, image, OTHER_TYPE) == []


@pytest.mark.parametrize(
    "reply",
    [
        Status(status=404, code="NOT_FOUND", path="/referrers/"),
        Status(status=404, body=b"<html>", path="/referrers/"),
        Status(status=405, path="/referrers/"),
        Status(status=400, path="/referrers/"),
        Status(status=200, body=b"<html>", headers={"Content-Type": "text/html"}, path="/referrers/"),
        Status(status=200, body=b"{}", path="/referrers/"),
    ],
)
def test_whatever_is_not_the_api_leads_to_the_tag(start: StartRegistry, reply: Status) -> None:
    registry, image = start_with_image(start)
    listed = Descriptor(OCI_MANIFEST, EMPTY_JSON_DIGEST, 2, artifact_type=SOCI_INDEX_V1)
    index = go_json(ImageIndex(OCI_INDEX, (listed,)).to_json())
    registry.add_manifest(index, OCI_INDEX, tag=fallback_tag(image.digest))
    registry.fault(reply)
    reply.hits = 0
    assert find(registry, image) == [EMPTY_JSON_DIGEST]


def test_an_unknown_repository_is_no_missing_api(start: StartRegistry) -> None:
    registry, image = start_with_image(start)
    ref = registry.reference("absent", image.digest)
    error = failure(
        registry, BlobNotFound, lambda: run(registry, lambda client: client.referrers(ref, SOCI_INDEX_V1))
    )
    assert "answered 404 NAME_UNKNOWN" in str(error)
    assert registry.count(path="/manifests/") == 0


def test_a_failing_api_is_no_missing_api(start: StartRegistry) -> None:
    registry, image = start_with_image(start)
    registry.fault(Status(status=500, path="/referrers/", count=-1))
    failure(registry, RegistryUnavailable, lambda: find(registry, image))
    assert registry.count(path="/manifests/") == 0


@pytest.mark.parametrize("data", [b"{", b'{"manifests":[{}]}', b'{"layers":[]}'])
def test_a_broken_answer_is_named(start: StartRegistry, data: bytes) -> None:
    registry, image = start_with_image(start)
    registry.fault(Status(status=200, path="/referrers/", body=data, headers={"Content-Type": OCI_INDEX}))
    failure(registry, InvalidIndex, lambda: find(registry, image))


def test_a_tag_that_is_no_index_is_named(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    registry.add_manifest(image.manifest, tag=fallback_tag(image.digest))
    error = failure(registry, InvalidIndex, lambda: find(registry, image))
    assert str(error) == f"referrers tag {registry.host}/app:{fallback_tag(image.digest)}: not an index"


def test_endless_pages_are_cut_off(start: StartRegistry) -> None:
    registry, image = start_with_image(start)
    page = go_json(ImageIndex(OCI_INDEX, ()).to_json())
    link = f'</v2/app/referrers/{image.digest}?after=1>; rel="next"'
    headers = {"Content-Type": OCI_INDEX, "Link": link}
    registry.fault(Status(status=200, path="/referrers/", body=page, headers=headers, count=-1))
    error = failure(registry, RegistryRefused, lambda: find(registry, image))
    assert f"more than {MAX_PAGES} pages" in str(error)
    assert registry.count(path="/referrers/") == MAX_PAGES


def test_a_next_page_elsewhere_gets_no_credentials(start: StartRegistry) -> None:
    (registry, image), other = start_with_image(start, auth=Bearer()), start()
    page = go_json(ImageIndex(OCI_INDEX, ()).to_json())
    headers = {"Content-Type": OCI_INDEX, "Link": f'<{other.url}/x>; rel="next"'}
    registry.fault(Status(status=200, path="/referrers/", body=page, headers=headers))
    other.fault(Status(status=200, body=page, headers={"Content-Type": OCI_INDEX}))
    assert find(registry, image) == []
    assert "authorization" not in other.requests[0].headers


def test_a_tag_alone_has_no_referrers(start: StartRegistry) -> None:
    registry, _ = start_with_image(start)
    with pytest.raises(UsageError, match="a digest is needed"):
        run(registry, lambda client: client.referrers(registry.reference("app"), SOCI_INDEX_V1))


@pytest.mark.parametrize("options", [API, OLD])
def test_what_is_published_is_found(start: StartRegistry, options: ReferrersOptions) -> None:
    registry, image = start_with_image(start, auth=Bearer(), referrers=options)
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> None:
        pushed = [
            await client.push_referrer(ref, artifact(image, number), OCI_MANIFEST) for number in range(3)
        ]
        await client.push_referrer(ref, artifact(image, 0, OTHER_TYPE), OCI_MANIFEST)
        assert await client.referrers(ref.with_digest(image.digest), SOCI_INDEX_V1) == tuple(pushed)

    run(registry, work)
    assert registry.count(path=fallback_tag(image.digest), method="PUT") == (0 if options is API else 4)


def test_publishing_twice_lists_once(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> None:
        first = await client.push_referrer(ref, artifact(image, 1), OCI_MANIFEST)
        assert await client.push_referrer(ref, artifact(image, 1), OCI_MANIFEST) == first

    run(registry, work)
    assert registry.count(path=fallback_tag(image.digest), method="PUT") == 1
    index = parse(registry.manifest("app", fallback_tag(image.digest)))
    assert isinstance(index, ImageIndex)
    assert len(index.manifests) == 1


def test_the_fallback_index_is_written_as_the_reference_writes_it(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    data = artifact(image, 1)
    run(registry, lambda client: client.push_referrer(registry.reference("app"), data, OCI_MANIFEST))
    entry = f'{{"mediaType":"{OCI_MANIFEST}","digest":"{sha256_digest(data)}","size":{len(data)}'
    entry += f',"annotations":{{"number":"1"}},"artifactType":"{SOCI_INDEX_V1}"}}'
    expected = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{entry}]}}'
    assert registry.manifest("app", fallback_tag(image.digest)) == expected.encode()


def test_an_older_list_is_kept_with_everything_in_it(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    signature = registry.add_manifest(artifact(image, 0, OTHER_TYPE))
    old = Descriptor(OCI_MANIFEST, signature, 5, annotations={"k": "v"}, artifact_type=OTHER_TYPE)
    index = ImageIndex(OCI_INDEX, (old,), annotations={"kept": "yes"})
    registry.add_manifest(go_json(index.to_json()), OCI_INDEX, tag=fallback_tag(image.digest))
    run(
        registry,
        lambda client: client.push_referrer(registry.reference("app"), artifact(image, 1), OCI_MANIFEST),
    )
    grown = parse(registry.manifest("app", fallback_tag(image.digest)))
    assert isinstance(grown, ImageIndex)
    assert grown.manifests[0] == old
    assert grown.annotations == {"kept": "yes"}
    assert len(grown.manifests) == 2


def test_tasks_that_publish_at_once_do_not_lose_each_other(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)

    async def work(client: RegistryClient) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(
                    client.push_referrer, registry.reference("app"), artifact(image, number), OCI_MANIFEST
                )

    run(registry, work)
    assert len(find(registry, image)) == 6


def test_an_artifact_type_of_its_own_wins_over_the_configs(start: StartRegistry) -> None:
    registry, image = start_with_image(start, referrers=OLD)
    obj = json.loads(artifact(image, 1)) | {"artifactType": OTHER_TYPE}
    ref = registry.reference("app")
    pushed = run(registry, lambda client: client.push_referrer(ref, json.dumps(obj).encode(), OCI_MANIFEST))
    assert pushed.artifact_type == OTHER_TYPE
    assert find(registry, image, OTHER_TYPE) == [pushed.digest]


def test_a_manifest_without_a_subject_is_refused(start: StartRegistry) -> None:
    registry, image = start_with_image(start)
    ref = registry.reference("app")
    error = failure(
        registry,
        InvalidIndex,
        lambda: run(registry, lambda client: client.push_referrer(ref, image.manifest, OCI_MANIFEST)),
    )
    assert "it has no subject" in str(error)
    assert registry.requests == []
