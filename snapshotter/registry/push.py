"""Uploads: a blob by POST and one PUT, a blob by mounting, a manifest.

Every function may be repeated: content is named by its digest, and what is there already is not sent again.
"""

from __future__ import annotations

from urllib.parse import quote

from snapshotter.errors import BlobNotFound, DigestMismatch, RegistryRefused
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCTET_STREAM
from snapshotter.oci.reference import Reference
from snapshotter.registry.hosts import PUSH
from snapshotter.registry.replies import MAX_ERROR_BODY
from snapshotter.registry.session import Call, Session
from snapshotter.registry.wire import Reply, joined
from snapshotter.units import Digest, sha256_digest


async def has_blob(session: Session, ref: Reference, digest: Digest) -> bool:
    """Say whether the repository of `ref` has the blob. Raises RegistryError."""
    # Asked where a push would go: what a mirror has, the registry need not have.
    call = Call(f"blob {digest} of {ref.locator}", ref, "HEAD", f"blobs/{digest}", capability=PUSH)
    try:
        await session.fetch(call, limit=0)
    except BlobNotFound:
        return False
    return True


async def push_blob(session: Session, ref: Reference, data: bytes, media_type: str) -> Descriptor:
    """Upload `data` unless it is there, and return its descriptor. Raises RegistryError."""
    descriptor = Descriptor(media_type, sha256_digest(data), len(data))
    # One unit of retry: an upload that broke cannot be gone on with, only begun again.
    await session.retrying(
        f"upload of blob {descriptor.digest} to {ref.locator}",
        lambda: _upload(session, ref, descriptor.digest, data),
    )
    return descriptor


async def mount_blob(session: Session, ref: Reference, digest: Digest, source_repository: str) -> bool:
    """Have the registry take a blob over from `source_repository`; say whether it did. Raises RegistryError."""
    what = f"mount of blob {digest} into {ref.locator}"
    path = f"blobs/uploads/?mount={quote(digest)}&from={quote(source_repository, safe='')}"
    success = frozenset({201, 202})
    call = Call(what, ref, "POST", path, content=b"", push=True, source=source_repository, success=success)
    # 202 opens an upload instead. It is left alone: registries forget such uploads by themselves.
    return (await session.fetch(call, limit=MAX_ERROR_BODY)).status == 201


async def push_manifest(
    session: Session, ref: Reference, data: bytes, media_type: str
) -> tuple[Descriptor, Digest | None]:
    """Upload a manifest by digest or tag. Returns its descriptor, and the subject if the registry keeps track.

    Raises DigestMismatch, before anything is sent, when `ref.digest` is not its digest; RegistryError.
    """
    descriptor = Descriptor(media_type, sha256_digest(data), len(data))
    what = f"upload of manifest {ref.digest or ref.tag} to {ref.locator}"
    if ref.digest is not None and ref.digest != descriptor.digest:
        raise DigestMismatch(f"{what}: its digest is {descriptor.digest}")
    headers = {"Content-Type": media_type}
    path = f"manifests/{ref.digest or ref.tag}"
    call = Call(what, ref, "PUT", path, headers, data, push=True, success=frozenset({200, 201, 202}))
    reply = await session.fetch(call, limit=MAX_ERROR_BODY)
    announced = reply.headers.get("Docker-Content-Digest", descriptor.digest)
    if announced != descriptor.digest:
        raise DigestMismatch(f"{what}: the registry stored other content under it")
    subject = reply.headers.get("OCI-Subject")
    return descriptor, None if subject is None else Digest(subject)


async def _upload(session: Session, ref: Reference, digest: Digest, data: bytes) -> None:
    """Send a blob: one attempt."""
    what = f"upload of blob {digest} to {ref.locator}"
    if await _is_there(session, ref, digest, what):
        return
    start = Call(what, ref, "POST", "blobs/uploads/", content=b"", push=True, success=frozenset({202}))
    reply = await session.once(start, limit=MAX_ERROR_BODY)
    headers = {"Content-Type": OCTET_STREAM}
    path = with_digest(what, reply, digest)
    finish = Call(what, ref, "PUT", path, headers, data, push=True, success=frozenset({201, 204}))
    await session.once(finish, limit=MAX_ERROR_BODY)


async def _is_there(session: Session, ref: Reference, digest: Digest, what: str) -> bool:
    # Asked with the right to push, so that one token serves all three requests.
    call = Call(what, ref, "HEAD", f"blobs/{digest}", push=True, success=frozenset({200, 404}))
    return (await session.once(call, limit=0)).status == 200


def with_digest(what: str, reply: Reply, digest: Digest) -> str:
    """Return the upload's URL with the digest added. The rest of its query is the registry's, and left alone."""
    location = reply.headers.get("Location")
    if not location:
        raise RegistryRefused(f"{what}: the registry opened an upload without a Location")
    absolute = str(joined(what, reply.url, location))
    return f"{absolute}{'&' if '?' in absolute else '?'}digest={quote(digest, safe='')}"
