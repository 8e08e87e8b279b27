"""A real registry for tests: HTTP or HTTPS in threads, content in memory, and faults on demand.

    with Registry(auth=Bearer(), presigned_ttl=60) as registry:
        image = registry.add_image([layer_bytes, Path("layer.tar.gz")], repository="app", tag="v1")
        ref = Reference.parse(image.name)              # 127.0.0.1:<port>/app:v1
        registry.fault(Truncate(path="/storage/", after=1000))
        ...
        assert registry.count(path="/storage/") == 3

What it speaks: the pull and push parts of the OCI distribution API (manifests, blobs with ranges, monolithic and
chunked uploads, mounts, tags, referrers with pages), token servers, and blobs behind presigned URLs.

- `auth`: NoAuth, Basic, Bearer (a token server on a port of its own) or Ecr (Basic, whose expired credentials
  are a 403). `registry.secrets` lists every password, token and signature in play; `assert_no_secret` checks texts.
- `presigned_ttl`: with a number, blobs are answered by a 307 to a presigned URL on another port that lives so long.
- `registry.requests`: every request so far, oldest first (`Request` in registry_server.py). `count` filters them.
- `registry.fault(...)`: arms one of the classes of registry_faults.py.

Concurrency: everything may be called from any thread at any time. Deliberately not here: a check of what is
pushed against the specification, deletion, and more than one user.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageManifest, go_json
from snapshotter.oci.media_types import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST
from snapshotter.oci.reference import Reference
from snapshotter.units import Digest, sha256_digest
from tests.support.registry_api import Api, ReferrersOptions
from tests.support.registry_auth import Basic, Bearer, Ecr, NoAuth
from tests.support.registry_faults import (
    Drop,
    ExpireToken,
    ExpireUrl,
    Fault,
    FlipByte,
    IgnoreRange,
    LoseReply,
    Redirect,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.registry_server import HttpServer, Request
from tests.support.registry_storage import Storage
from tests.support.tls import Certificate

__all__ = [
    "Basic", "Bearer", "Drop", "Ecr", "ExpireToken", "ExpireUrl", "Fault", "FlipByte", "IgnoreRange", "Image", "LoseReply",
    "NoAuth", "Redirect", "ReferrersOptions", "Registry", "Request", "Slow", "Stall", "Status", "Truncate", "WrongRange",
]  # fmt: skip

AnyFault = TypeVar("AnyFault", bound=Fault)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was put into the registry."""

    name: str
    """The reference to pull it by."""
    repository: str
    digest: Digest
    """Of the manifest."""
    manifest: bytes
    config: Digest
    layers: tuple[Descriptor, ...]


class Registry:
    """A registry on `address`, running from construction to `close()`. The module's docstring is its manual.

    Its sockets are made by the thread that makes it, in that thread's network namespace.
    """

    def __init__(
        self,
        *,
        auth: NoAuth | None = None,
        presigned_ttl: float | None = None,
        certificate: Certificate | None = None,
        referrers: ReferrersOptions | None = None,
        relative_locations: bool = True,
        address: str = "127.0.0.1",
    ) -> None:
        self.auth = NoAuth() if auth is None else auth
        self.certificate = certificate
        self.referrers = ReferrersOptions() if referrers is None else referrers
        self._api = Api(self.auth, self.referrers, relative_locations=relative_locations)
        self._server = HttpServer("registry", self._api.answer, certificate, address)
        self._api.url = self._server.url
        token_server = self.auth.start(self._server, certificate)
        self._servers = [self._server] if token_server is None else [self._server, token_server]
        if presigned_ttl is not None:
            self._api.storage = Storage(self._api.blobs, presigned_ttl, self._server, certificate)
            self._servers.append(self._api.storage.server)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every connection and thread. Raises what went wrong inside the servers, if anything did."""
        for server in self._servers:
            server.close()
        if self._server.errors:
            raise self._server.errors[0]

    # ---- where it is ----

    @property
    def host(self) -> str:
        """`<address>:<port>`: the registry's name in references."""
        return self._server.host

    @property
    def url(self) -> str:
        """Scheme and host."""
        return self._server.url

    @property
    def storage_host(self) -> str:
        """Host of the presigned URLs; the registry's own where there are none."""
        return self.host if self._api.storage is None else self._api.storage.server.host

    @property
    def ca_file(self) -> Path | None:
        """What a client must trust, None for plain HTTP."""
        return None if self.certificate is None else self.certificate.ca_file

    def reference(self, repository: str, tag: str = "latest") -> Reference:
        """Return a reference into this registry; `tag` may be a digest too."""
        return Reference.parse(f"{self.host}/{repository}{'@' if ':' in tag else ':'}{tag}")

    # ---- what it holds ----

    def add_blob(self, data: bytes | Path, *, repository: str = "app") -> Digest:
        """Store a blob, or a file without reading it into memory, and return its digest."""
        with self._api.lock:
            digest = self._api.add_blob(data if isinstance(data, bytes) else _map(data))
            self._api.repository(repository).blobs.add(digest)
        return digest

    def add_manifest(
        self, data: bytes, media_type: str = OCI_MANIFEST, *, repository: str = "app", tag: str | None = None
    ) -> Digest:
        """Store a manifest or index as it is, under `tag` too if given, and return its digest."""
        digest = sha256_digest(data)
        with self._api.lock:
            self._api.repository(repository).manifests[digest] = (media_type, data)
            if tag is not None:
                self._api.repository(repository).tags[tag] = digest
        return digest

    def add_image(
        self,
        layers: Sequence[bytes | Path],
        *,
        repository: str = "app",
        tag: str = "latest",
        layer_media_type: str = OCI_LAYER_GZIP,
        diff_ids: Sequence[Digest] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> Image:
        """Store a linux/amd64 image of `layers`, lowest first. `diff_ids` are found by inflating unless given."""
        found = (
            [_diff_id(layer, layer_media_type) for layer in layers] if diff_ids is None else list(diff_ids)
        )
        rootfs = {"type": "layers", "diff_ids": found}
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode()
        descriptors = tuple(
            Descriptor(layer_media_type, self.add_blob(layer, repository=repository), _size(layer))
            for layer in layers
        )
        config_digest = self.add_blob(config, repository=repository)
        manifest = ImageManifest(
            media_type=OCI_MANIFEST,
            config=Descriptor(OCI_CONFIG, config_digest, len(config)),
            layers=descriptors,
            annotations=annotations or {},
        )
        data = go_json(manifest.to_json())
        digest = self.add_manifest(data, repository=repository, tag=tag)
        return Image(f"{self.host}/{repository}:{tag}", repository, digest, data, config_digest, descriptors)

    def blob(self, digest: str) -> bytes:
        """Return a stored blob. Raises KeyError."""
        return bytes(self._api.blobs[digest])

    def manifest(self, repository: str, reference: str) -> bytes:
        """Return a stored manifest by tag or digest. Raises KeyError."""
        found = self._api.repositories[repository]
        return found.manifests[found.tags.get(reference, reference)][1]

    def has_blob(self, repository: str, digest: str) -> bool:
        """Say whether `repository` holds the blob."""
        return digest in self._api.repository(repository).blobs

    def delete_blob(self, repository: str, digest: str) -> None:
        """Take a blob away from `repository`."""
        with self._api.lock:
            self._api.repository(repository).blobs.discard(digest)

    # ---- what happens to it ----

    def fault(self, fault: AnyFault) -> AnyFault:
        """Arm `fault`; the first armed one that matches a request breaks it."""
        with self._server.lock:
            self._server.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Disarm every fault."""
        with self._server.lock:
            self._server.faults.clear()

    @property
    def requests(self) -> list[Request]:
        """Every request so far, of all its servers, oldest first."""
        with self._server.lock:
            return list(self._server.records)

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        with self._server.lock:
            self._server.records.clear()

    def matching(self, *, path: str = "", method: str = "", server: str = "") -> list[Request]:
        """Return the requests whose path has the regular expression `path` in it, oldest first."""
        return [
            request
            for request in self.requests
            if re.search(path, request.path)
            and method in {"", request.method}
            and server in {"", request.server}
        ]

    def count(self, *, path: str = "", method: str = "", server: str = "") -> int:
        """Return how many requests `matching` finds."""
        return len(self.matching(path=path, method=method, server=server))

    @property
    def secrets(self) -> list[str]:
        """Every password, token, upload state and URL signature so far."""
        stored = [] if self._api.storage is None else self._api.storage.secrets
        return [*self.auth.secrets, *stored]

    def assert_no_secret(self, *texts: str) -> None:
        """Assert that none of the secrets is in any of `texts`, plain or URL-quoted."""
        for text in texts:
            for secret in self.secrets:
                assert secret not in text, f"a secret is shown in {text!r}"
                assert quote(secret, safe="") not in text, f"a secret is shown in {text!r}"


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _size(layer: bytes | Path) -> int:
    return len(layer) if isinstance(layer, bytes) else layer.stat().st_size


def _diff_id(layer: bytes | Path, media_type: str) -> Digest:
    """Return the digest of the uncompressed layer. gzip and plain layers only."""
    raw = io.BytesIO(layer) if isinstance(layer, bytes) else layer.open("rb")
    with raw, gzip.open(raw) if media_type.endswith("gzip") else raw as stream:
        return Digest("sha256:" + hashlib.file_digest(stream, "sha256").hexdigest())
