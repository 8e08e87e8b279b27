"""Referrers: the manifests that name another one as their subject, found and made findable.

Registries since OCI distribution 1.1 keep the list; for the others it is an index under the tag
`sha256-<hex>` of the subject, kept by whoever pushes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final
from urllib.parse import quote

import httpx

from snapshotter.errors import BlobNotFound, InvalidIndex, RegistryRefused, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import MAX_MANIFEST_SIZE, ImageIndex, ImageManifest, go_json, parse
from snapshotter.oci.media_types import OCI_INDEX
from snapshotter.oci.reference import Reference
from snapshotter.registry.hosts import RESOLVE, Host
from snapshotter.registry.push import push_manifest
from snapshotter.registry.replies import error_code
from snapshotter.registry.session import Call, Session
from snapshotter.registry.wire import Reply, host_of, joined
from snapshotter.units import Digest, digest_hex, sha256_digest

MAX_PAGES: Final = 64
"""Pages of referrers that are read; more than that of one type for one image is no answer."""

FetchManifest = Callable[[Reference], Awaitable[tuple[Descriptor, bytes]]]


def fallback_tag(subject: Digest) -> str:
    """Return the tag under which the referrers of `subject` are listed where the API is missing."""
    return f"sha256-{digest_hex(subject)}"


async def find(
    session: Session, fetch_manifest: FetchManifest, ref: Reference, artifact_type: str
) -> tuple[Descriptor, ...]:
    """Return the referrers of `ref.digest` that have `artifact_type`. Raises RegistryError, InvalidIndex."""
    if ref.digest is None:
        raise UsageError(f"referrers of {ref}: a digest is needed")
    found = await _from_api(session, ref, ref.digest, artifact_type)
    if found is None:
        listing = await _listing(fetch_manifest, ref, ref.digest)
        found = () if listing is None else listing.manifests
    return tuple(descriptor for descriptor in found if descriptor.artifact_type == artifact_type)


async def publish(
    session: Session, fetch_manifest: FetchManifest, ref: Reference, data: bytes, media_type: str
) -> Descriptor:
    """Upload a manifest with a subject and see that the subject's referrers include it.

    Raises InvalidIndex without a subject; RegistryError. Between reading and writing a fallback tag, somebody
    else's entry can be lost: the distribution specification offers no better.
    """
    manifest = parse(data, media_type)
    subject = manifest.subject
    if subject is None:
        raise InvalidIndex(f"manifest to push to {ref.locator}: it has no subject")
    pushed, kept_for = await push_manifest(session, ref.with_digest(sha256_digest(data)), data, media_type)
    descriptor = replace(pushed, artifact_type=_artifact_type(manifest), annotations=manifest.annotations)
    if kept_for is None:
        await _list(session, fetch_manifest, ref, subject.digest, descriptor)
    return descriptor


async def _list(
    session: Session, fetch_manifest: FetchManifest, ref: Reference, subject: Digest, entry: Descriptor
) -> None:
    """Add `entry` to the fallback tag, unless it is there."""
    listing = await _listing(fetch_manifest, ref, subject) or ImageIndex(OCI_INDEX, ())
    if any(known.digest == entry.digest for known in listing.manifests):
        return
    grown = replace(listing, manifests=(*listing.manifests, entry))
    await push_manifest(session, ref.with_tag(fallback_tag(subject)), go_json(grown.to_json()), OCI_INDEX)


async def _listing(fetch_manifest: FetchManifest, ref: Reference, subject: Digest) -> ImageIndex | None:
    """Return the index under the fallback tag, None if there is no such tag."""
    at_tag = ref.with_tag(fallback_tag(subject))
    try:
        descriptor, data = await fetch_manifest(at_tag)
    except BlobNotFound:
        return None
    listing = parse(data, descriptor.media_type)
    if not isinstance(listing, ImageIndex):
        raise InvalidIndex(f"referrers tag {at_tag}: not an index")
    return listing


async def _from_api(
    session: Session, ref: Reference, subject: Digest, artifact_type: str
) -> tuple[Descriptor, ...] | None:
    """Return what the referrers API lists, None if the registry has no such API.

    A mirror that lists nothing, or has no such API, says nothing about the registry.
    """
    what = f"referrers of {ref.locator}@{subject}"
    path = f"referrers/{subject}?artifactType={quote(artifact_type, safe='')}"
    call = Call(
        what, ref, "GET", path, {"Accept": OCI_INDEX}, capability=RESOLVE, success=frozenset({200, 404})
    )
    last = session.hosts_for(call)[-1]

    async def ask(host: Host) -> tuple[Descriptor, ...] | None:
        found = await _pages(session, host, call)
        if not found and host != last:
            raise BlobNotFound(f"{what}: {host.name} lists none")
        return found

    return await session.retrying(what, lambda: session.first(call, ask))


async def _pages(session: Session, host: Host, call: Call) -> tuple[Descriptor, ...] | None:
    """Return what `host` lists on all pages, None if it has no such API."""
    found: list[Descriptor] = []
    for _ in range(MAX_PAGES):
        try:
            reply = await session.ask(host, call, limit=MAX_MANIFEST_SIZE)
        except RegistryRefused:
            # Older registries take "referrers" for a broken path of another API and answer 400 or 405.
            return None
        if reply.status == 404 and error_code(reply.body) == "NAME_UNKNOWN":
            raise BlobNotFound(f"{call.what}: {host_of(reply.url)} answered 404 NAME_UNKNOWN")
        if reply.status == 404 or reply.media_type != OCI_INDEX:
            return None
        page = parse(reply.body, OCI_INDEX)
        assert isinstance(page, ImageIndex)
        found += page.manifests
        following = _next_page(call.what, reply)
        if following is None:
            return tuple(found)
        call = replace(call, path=following)
    raise RegistryRefused(f"{call.what}: more than {MAX_PAGES} pages")


def _next_page(what: str, reply: Reply) -> str | None:
    """Return the URL that a Link header calls the next one."""
    links = httpx.Response(reply.status, headers=reply.headers).links
    target = links.get("next", {}).get("url")
    return None if target is None else str(joined(what, reply.url, target))


def _artifact_type(manifest: ImageManifest | ImageIndex) -> str:
    """Return the type by which referrers are filtered: an image manifest without one has its config's."""
    if manifest.artifact_type or isinstance(manifest, ImageIndex):
        return manifest.artifact_type
    return manifest.config.media_type
