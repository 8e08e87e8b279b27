"""The registry API: manifests, blobs, referrers, and where a blob's bytes are at the moment.

Everything that is returned has the digest by which it was asked. It owns the connections and what was learned
about each registry. Bulk ranges are not read here but by `ranges.RangeClient`, for which `blob_source` finds
the URL; pushing is in push.py.

Concurrency: any number of tasks of one trio run.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from snapshotter.errors import (
    AuthenticationFailed,
    DigestMismatch,
    RangeNotHonoured,
    RegistryRefused,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import MAX_MANIFEST_SIZE, parse
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES, OCTET_STREAM
from snapshotter.oci.reference import Reference
from snapshotter.registry import push, referrers, stream
from snapshotter.registry.flight import Flights
from snapshotter.registry.health import HostStatistics
from snapshotter.registry.hosts import NO_LIMIT, Host, Hosts, OwnHosts
from snapshotter.registry.keychain import Keychain
from snapshotter.registry.replies import check_content_range
from snapshotter.registry.retry import DEFAULT_RETRY, DEFAULT_TIMEOUTS, RetryPolicy, Timeouts
from snapshotter.registry.sending import SendingClient
from snapshotter.registry.session import Call, Session, blob_call, headers_for, manifest_call
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import USER_AGENT
from snapshotter.registry.upload import BlobUpload, Source
from snapshotter.registry.wire import Reply, host_of
from snapshotter.units import Digest, parse_digest, sha256_digest

MAX_SOURCES: Final = 4096
"""Sources kept, the least recently used ones forgotten first: some 2 MB, and more layers than a host mounts."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a client has done so far."""

    requests: int
    retries: int
    tokens_fetched: int
    hosts: Mapping[str, HostStatistics] = field(default_factory=dict)
    """By the names of hosts.Host."""


class RegistryClient:
    """Manifests and blobs of any registry. An asynchronous context manager.

    `hosts` knows the mirrors. Without it every registry stands for itself, and `plain_http` True or False forces the
    scheme; by default it is http for loopback names and https otherwise.
    `ca_file` is trusted besides the system's authorities. Errors name the registry's host, the repository and
    the digest; they are RegistryError, DigestMismatch, or InvalidIndex for a manifest that cannot be read.
    """

    def __init__(
        self,
        *,
        keychain: Keychain,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        retry: RetryPolicy = DEFAULT_RETRY,
        plain_http: bool | None = None,
        hosts: Hosts | None = None,
        user_agent: str = USER_AGENT,
        ca_file: Path | None = None,
    ) -> None:
        self._session = Session(
            keychain=keychain,
            timeouts=timeouts,
            retry=retry,
            hosts=OwnHosts(plain_http=plain_http) if hosts is None else hosts,
            allow_downgrade=plain_http is True,
            user_agent=user_agent,
            ca_file=ca_file,
        )
        self._make_sender = functools.partial(
            SendingClient, timeouts=timeouts, user_agent=user_agent, ca_file=ca_file
        )
        self._sender: SendingClient | None = None
        """Made when it is needed: most clients push nothing."""
        self._sources: OrderedDict[tuple[str, Digest], BlobSource] = OrderedDict()
        self._source_flights: Flights[tuple[str, Digest], BlobSource] = Flights()
        self._fallback_lock = trio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.aclose()
        if self._sender is not None:
            self._sender.close()

    def statistics(self) -> Statistics:
        """Return the counts so far."""
        return Statistics(
            self._session.requests,
            self._session.retries,
            self._session.authorizer.tokens_fetched,
            self._session.circuits.statistics(),
        )

    async def resolve(self, ref: Reference) -> Descriptor:
        """Return media type, digest and size of the manifest at `ref`: by a HEAD where that says enough."""
        call = manifest_call(ref, "HEAD")
        try:
            reply = await self._session.fetch(call, limit=0)
        except (AuthenticationFailed, RegistryRefused):
            # A HEAD has no body to say why; ECR's expired credentials are told from a refusal by the body alone.
            return (await self.manifest(ref))[0]
        descriptor = _described(reply)
        if descriptor is None:
            return (await self.manifest(ref))[0]
        if ref.digest is not None and descriptor.digest != ref.digest:
            raise DigestMismatch(f"{call.what}: the registry calls it {descriptor.digest}")
        return descriptor

    async def manifest(self, ref: Reference) -> tuple[Descriptor, bytes]:
        """Return the manifest or index at `ref`, its bytes as they are, of at most 4 MiB.

        Raises DigestMismatch when they have neither `ref.digest` nor the digest that the registry announced.
        """
        call = manifest_call(ref, "GET")
        reply = await self._fetch_verified(call, ref.digest, limit=MAX_MANIFEST_SIZE)
        digest = sha256_digest(reply.body)
        media_type = reply.media_type
        if media_type not in MANIFEST_TYPES | INDEX_TYPES:
            media_type = parse(reply.body).media_type
        return Descriptor(media_type, digest, len(reply.body)), reply.body

    async def blob(self, ref: Reference, target: Descriptor | Digest, *, max_size: int) -> bytes:
        """Return a whole blob of at most `max_size` bytes.

        Raises RegistryRefused when it is larger, DigestMismatch when it is not what its digest says.
        """
        digest, size = _target(target)
        call = blob_call(ref, digest)
        if size is not None and size > max_size:
            raise RegistryRefused(f"{call.what}: {size} bytes, more than the {max_size} allowed")
        return (await self._fetch_verified(call, digest, limit=max_size)).body

    async def has_blob(self, ref: Reference, digest: Digest) -> bool:
        """Say whether the repository of `ref` has the blob."""
        return await push.has_blob(self._session, ref, digest)

    async def stream_blob(self, ref: Reference, target: Descriptor | Digest) -> AsyncGenerator[bytes, None]:
        """Yield a whole blob in pieces; a broken stream goes on where it broke. Use with contextlib.aclosing.

        Raises DigestMismatch after the last piece when together they are not what the digest says.
        """
        digest, size = _target(target)
        async with aclosing(stream.stream_blob(self._session, ref, digest, size)) as pieces:
            async for piece in pieces:
                yield piece

    async def referrers(self, ref: Reference, artifact_type: str) -> tuple[Descriptor, ...]:
        """Return the manifests of `artifact_type` whose subject is `ref.digest`, in the registry's order.

        Asks the referrers API, or the fallback tag where a registry has none. No referrers, an empty tuple.
        """
        return await referrers.find(self._session, self.manifest, ref, artifact_type)

    async def blob_source(self, ref: Reference, digest: Digest, *, renew: bool = False) -> BlobSource:
        """Return where to read ranges of a blob. It is kept, until `renew` asks for a new one.

        Raises RangeNotHonoured when the registry does not serve ranges.
        """
        key = (ref.locator, digest)
        source = self._sources.get(key)
        if source is None or renew:
            source = await self._source_flights.run(key, lambda: self._find_source(ref, digest))
            self._sources[key] = source
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(key)
        return source

    def blame(self, mirror: str, error: Exception) -> None:
        """Note what went wrong with a source that `mirror` gave; it is not asked for a while."""
        self._session.blame(mirror, error)

    async def push_blob(self, ref: Reference, data: bytes, media_type: str = OCTET_STREAM) -> Descriptor:
        """Upload `data` unless the repository has it, and return its descriptor."""
        return await push.push_blob(self._session, ref, data, media_type)

    def upload(self, ref: Reference, blob: Descriptor, source: Source) -> BlobUpload:
        """Return an upload into the repository of `ref`, not begun yet: `source` yields the blob from an offset on."""
        if self._sender is None:
            self._sender = self._make_sender()
        return BlobUpload(self._session, self._sender, ref, blob, source)

    async def mount_blob(self, ref: Reference, digest: Digest, source_repository: str) -> bool:
        """Have the registry take a blob over from another of its repositories; say whether it did."""
        return await push.mount_blob(self._session, ref, digest, source_repository)

    async def push_manifest(self, ref: Reference, data: bytes, media_type: str) -> Descriptor:
        """Upload a manifest by `ref.digest` if there is one, else by `ref.tag`, and return its descriptor."""
        return (await push.push_manifest(self._session, ref, data, media_type))[0]

    async def push_referrer(self, ref: Reference, data: bytes, media_type: str) -> Descriptor:
        """Upload a manifest that has a subject, by its digest, so that `referrers` of the subject find it.

        Where the registry does not keep referrers itself, the fallback tag of the subject lists it afterwards,
        besides what it listed before. Returns the descriptor that referrers give. Raises InvalidIndex without
        a subject.
        """
        # Two of our own tasks must not read and write the same list at once; other writers cannot be kept out.
        async with self._fallback_lock:
            return await referrers.publish(self._session, self.manifest, ref, data, media_type)

    async def _fetch_verified(self, call: Call, digest: Digest | None, *, limit: int) -> Reply:
        """Return the reply, whose body has `digest`, or else the digest that the registry announced with it.

        What came damaged is asked for once more: one more request is cheaper than a layer that is not lazy.
        """

        def check(reply: Reply) -> None:
            if _is_damaged(reply, digest):
                found = sha256_digest(reply.body)
                raise DigestMismatch(f"{call.what}: {host_of(reply.url)} sent content of digest {found}")

        try:
            return await self._session.fetch(call, limit=limit, check=check)
        except DigestMismatch:
            return await self._session.fetch(call, limit=limit, check=check)

    async def _find_source(self, ref: Reference, digest: Digest) -> BlobSource:
        call = blob_call(ref, digest, start=0, end=2)
        last = self._session.hosts_for(call)[-1]
        return await self._session.retrying(
            call.what,
            lambda: self._session.first(call, lambda host: self._follow(host, call, is_mirror=host != last)),
        )

    async def _follow(self, host: Host, call: Call, *, is_mirror: bool) -> BlobSource:
        """Ask for the first two bytes, as the data will be asked for, and see where that leads."""
        deadline = self._session.wire.deadline(host.timeout)
        response = await self._session.open(host, call, deadline)
        where = host_of(response.url)
        if response.status_code == 200:
            await response.aclose()
            raise RangeNotHonoured(f"{call.what}: {where} answers a range request with everything")
        await self._session.wire.read(response, call.what, limit=2, deadline=deadline)
        check_content_range(call.what, where, response.headers.get("Content-Range"), 0, 2)
        return BlobSource(
            str(response.url),
            headers_for(host, response, response.url),
            where,
            call.what,
            host.name if is_mirror else "",
            host.trust,
            0.0 if host.timeout in {None, NO_LIMIT} else float(host.timeout or 0.0),
        )


def _is_damaged(reply: Reply, digest: Digest | None) -> bool:
    """Say whether the body has another digest than `digest`, or, without one, than the registry announced."""
    expected = digest or reply.headers.get("Docker-Content-Digest")
    return expected is not None and sha256_digest(reply.body) != expected


def _target(target: Descriptor | Digest) -> tuple[Digest, int | None]:
    return (target.digest, target.size) if isinstance(target, Descriptor) else (target, None)


def _described(reply: Reply) -> Descriptor | None:
    """Return the descriptor that the reply to a HEAD spells out, None when something is missing."""
    media_type, length = reply.media_type, reply.headers.get("Content-Length", "")
    try:
        digest = parse_digest(reply.headers.get("Docker-Content-Digest", ""))
    except ValueError:
        return None
    if media_type not in MANIFEST_TYPES | INDEX_TYPES or not (length.isascii() and length.isdigit()):
        return None
    return Descriptor(media_type, digest, int(length))
