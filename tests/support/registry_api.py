"""The API of the test registry: repositories in memory, and the OCI distribution requests upon them."""

from __future__ import annotations

import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from snapshotter.oci.media_types import OCI_INDEX
from snapshotter.units import Digest, sha256_digest
from tests.support.registry_auth import NoAuth, error_reply, json_reply
from tests.support.registry_faults import ExpireToken, Fault
from tests.support.registry_server import Reply, Request
from tests.support.registry_storage import Storage

_PATH = re.compile(r"/v2/(?P<name>[a-z0-9._/-]+?)/(?P<kind>manifests|blobs|referrers|tags)/(?P<rest>.+)")


@dataclass(slots=True)
class Repository:
    """What one repository holds. Blobs are stored once for all; here is who may see them."""

    blobs: set[str] = field(default_factory=set)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, tuple[str, bytearray]] = field(default_factory=dict)


@dataclass(slots=True)
class ReferrersOptions:
    """How the referrers API behaves: there at all, descriptors per page (0: all), filtering or not."""

    api: bool = True
    page: int = 0
    filter: bool = False


class Api:
    """The application behind the registry's port. `lock` guards `blobs` and `repositories`."""

    def __init__(self, auth: NoAuth, referrers: ReferrersOptions, *, relative_locations: bool) -> None:
        self.auth = auth
        self.referrers = referrers
        self.storage: Storage | None = None
        self.url = ""
        self.lock = threading.RLock()
        self.blobs: dict[str, memoryview] = {}
        self.repositories: dict[str, Repository] = {}
        self._relative = relative_locations

    def repository(self, name: str) -> Repository:
        """Return the repository called `name`, made if need be. The caller holds the lock."""
        return self.repositories.setdefault(name, Repository())

    def answer(self, request: Request, fault: Fault | None) -> Reply:
        """Return the reply to `request`."""
        match = _PATH.fullmatch(request.path)
        name = match["name"] if match else ""
        action = "pull" if request.method in {"GET", "HEAD"} else "push"
        if isinstance(fault, ExpireToken):
            return self.auth.expire(request, name, action)
        refusal = self.auth.check(request, name, action)
        if refusal is not None:
            return refusal
        if request.path == "/v2/":
            return json_reply(200, {})
        if match is None:
            return error_reply(404, "NAME_INVALID")
        with self.lock:
            if action == "pull" and name not in self.repositories:
                return error_reply(404, "NAME_UNKNOWN")
            handler = getattr(self, f"_{request.method.lower()}_{match['kind']}", None)
            return (
                error_reply(405, "UNSUPPORTED") if handler is None else handler(request, name, match["rest"])
            )

    def _get_manifests(self, request: Request, name: str, rest: str) -> Reply:
        repository = self.repositories[name]
        digest = repository.tags.get(rest, rest)
        if digest not in repository.manifests:
            return error_reply(404, "MANIFEST_UNKNOWN")
        media_type, data = repository.manifests[digest]
        return Reply(200, data, {"Content-Type": media_type, "Docker-Content-Digest": digest})

    def _get_blobs(self, request: Request, name: str, rest: str) -> Reply:
        if rest.startswith("uploads/"):
            return self._upload_status(request, name, rest)
        if rest not in self.repositories[name].blobs:
            return error_reply(404, "BLOB_UNKNOWN")
        if self.storage is not None:
            return Reply(307, b"", {"Location": self.storage.presign(rest)})
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": rest}
        return Reply(200, self.blobs[rest], headers, ranged=True)

    def _get_tags(self, request: Request, name: str, rest: str) -> Reply:
        return json_reply(200, {"name": name, "tags": sorted(self.repositories[name].tags)})

    def _get_referrers(self, request: Request, name: str, rest: str) -> Reply:
        if not self.referrers.api:
            return error_reply(404, "NOT_FOUND")
        found = [
            _referrer(digest, media_type, data)
            for digest, (media_type, data) in self.repositories[name].manifests.items()
            if (json.loads(data).get("subject") or {}).get("digest") == rest
        ]
        headers = {"Content-Type": OCI_INDEX}
        wanted = request.query.get("artifactType")
        if self.referrers.filter and wanted:
            found = [descriptor for descriptor in found if descriptor.get("artifactType") == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        if self.referrers.page:
            first = int(request.query.get("after", "0"))
            following = first + self.referrers.page
            if following < len(found):
                headers["Link"] = (
                    f'</v2/{name}/referrers/{rest}?artifactType={quote(wanted or "")}&after={following}>; rel="next"'
                )
            found = found[first:following]
        return json_reply(200, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}, headers)

    _head_manifests, _head_blobs = _get_manifests, _get_blobs

    def _put_manifests(self, request: Request, name: str, rest: str) -> Reply:
        digest = sha256_digest(request.body)
        if ":" in rest and rest != digest:
            return error_reply(400, "DIGEST_INVALID")
        repository = self.repository(name)
        obj = json.loads(request.body)
        needed = [obj["config"], *obj["layers"]] if "layers" in obj else []
        if any(descriptor["digest"] not in repository.blobs for descriptor in needed):
            return error_reply(400, "MANIFEST_BLOB_UNKNOWN")
        if any(descriptor["digest"] not in repository.manifests for descriptor in obj.get("manifests", ())):
            return error_reply(400, "MANIFEST_UNKNOWN")
        repository.manifests[digest] = (request.headers.get("content-type", ""), request.body)
        if ":" not in rest:
            repository.tags[rest] = digest
        headers = {
            "Location": self._location(f"/v2/{name}/manifests/{digest}"),
            "Docker-Content-Digest": digest,
        }
        if obj.get("subject") and self.referrers.api:
            headers["OCI-Subject"] = obj["subject"]["digest"]
        return Reply(201, b"", headers)

    def _post_blobs(self, request: Request, name: str, rest: str) -> Reply:
        repository = self.repository(name)
        digest, source = request.query.get("mount", ""), self.repositories.get(request.query.get("from", ""))
        if source is not None and digest in source.blobs:
            repository.blobs.add(digest)
            return Reply(201, b"", {"Location": self._location(f"/v2/{name}/blobs/{digest}")})
        upload, state = secrets.token_hex(8), secrets.token_hex(16)
        self.auth.secrets.append(state)
        repository.uploads[upload] = (state, bytearray())
        return Reply(202, b"", {"Location": self._upload(name, upload, state)})

    def _patch_blobs(self, request: Request, name: str, rest: str) -> Reply:
        upload = rest.removeprefix("uploads/")
        state, data = self.repository(name).uploads.get(upload, ("", None))
        if data is None or request.query.get("_state") != state:
            return error_reply(404, "BLOB_UPLOAD_UNKNOWN")
        data += request.body
        return Reply(202, b"", {"Location": self._upload(name, upload, state), "Range": f"0-{len(data) - 1}"})

    def _upload_status(self, request: Request, name: str, rest: str) -> Reply:
        upload = rest.removeprefix("uploads/")
        state, data = self.repository(name).uploads.get(upload, ("", bytearray()))
        if request.query.get("_state") != state:
            return error_reply(404, "BLOB_UPLOAD_UNKNOWN")
        headers = {"Location": self._upload(name, upload, state), "Range": f"0-{max(len(data) - 1, 0)}"}
        return Reply(204, b"", headers)

    def _put_blobs(self, request: Request, name: str, rest: str) -> Reply:
        upload = rest.removeprefix("uploads/")
        repository = self.repository(name)
        state, data = repository.uploads.get(upload, ("", None))
        if data is None or request.query.get("_state") != state:
            return error_reply(404, "BLOB_UPLOAD_UNKNOWN")
        digest = self.add_blob(bytes(data + request.body))
        if digest != request.query.get("digest"):
            return error_reply(400, "DIGEST_INVALID")
        del repository.uploads[upload]
        repository.blobs.add(digest)
        return Reply(
            201,
            b"",
            {"Location": self._location(f"/v2/{name}/blobs/{digest}"), "Docker-Content-Digest": digest},
        )

    def add_blob(self, data: bytes | memoryview) -> Digest:
        """Store `data`, for no repository yet."""
        digest = sha256_digest(data)
        self.blobs[digest] = memoryview(data)
        return digest

    def _upload(self, name: str, upload: str, state: str) -> str:
        return self._location(f"/v2/{name}/blobs/uploads/{upload}?_state={state}")

    def _location(self, path: str) -> str:
        return path if self._relative else self.url + path


def _referrer(digest: str, media_type: str, data: bytes) -> dict[str, Any]:
    """Return the descriptor of a stored manifest as the referrers API lists it."""
    obj = json.loads(data)
    descriptor = {"mediaType": media_type, "digest": digest, "size": len(data)}
    descriptor["artifactType"] = obj.get("artifactType") or obj.get("config", {}).get("mediaType", "")
    return descriptor | ({"annotations": obj["annotations"]} if obj.get("annotations") else {})
