"""The object store behind presigned URLs, on a port of its own, answering as S3 does."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping

from tests.support.registry_faults import ExpireUrl, Fault
from tests.support.registry_server import HttpServer, Reply, Request
from tests.support.tls import Certificate


class Storage:
    """Blobs at `/storage/<digest>` for those who hold an unexpired signature."""

    def __init__(
        self,
        blobs: Mapping[str, memoryview],
        ttl: float,
        registry: HttpServer,
        certificate: Certificate | None,
    ) -> None:
        self.ttl = ttl
        self.secrets: list[str] = []
        self._blobs = blobs
        self._key = secrets.token_bytes(16)
        self.server = HttpServer("storage", self._answer, certificate, registry.address)
        self.server.share(registry)

    def presign(self, digest: str) -> str:
        """Return a URL of the blob that is good for `ttl` seconds."""
        expires = repr(time.time() + self.ttl)
        signature = self._sign(digest, expires)
        self.secrets.append(signature)
        return f"{self.server.url}/storage/{digest}?X-Amz-Date={expires}&X-Amz-Signature={signature}"

    def _sign(self, digest: str, expires: str) -> str:
        return hmac.new(self._key, f"{digest}|{expires}".encode(), hashlib.sha256).hexdigest()

    def _answer(self, request: Request, fault: Fault | None) -> Reply:
        digest = request.path.removeprefix("/storage/")
        expires = request.query.get("X-Amz-Date", "0")
        if isinstance(fault, ExpireUrl) and fault.session:
            return _error(400, "ExpiredToken", "The provided token has expired.")
        if "authorization" in request.headers:
            return _error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if request.query.get("X-Amz-Signature") != self._sign(digest, expires):
            return _error(403, "SignatureDoesNotMatch", "The signature does not match.")
        if isinstance(fault, ExpireUrl) or float(expires) < time.time():
            return _error(403, "AccessDenied", "Request has expired")
        if digest not in self._blobs:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        return Reply(200, self._blobs[digest], {"Content-Type": "application/octet-stream"}, ranged=True)


def _error(status: int, code: str, message: str) -> Reply:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Reply(status, body.encode(), {"Content-Type": "application/xml"})
