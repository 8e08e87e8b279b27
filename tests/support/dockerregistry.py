"""A real registry: Debian's docker-registry on a loopback address, with its own storage and access log.

It has no referrers API (404), as that version is; clients use the fallback tag. What it served is read back
from its log, so a test can count requests and bytes without a proxy in between.

Concurrency: one thread drives it. The log is complete a moment after a request has ended (`requests` waits).
"""

from __future__ import annotations

import json
import re
import secrets
import ssl
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.images import Image
from tests.support.process import Service, free_port, is_asleep, wait_until

_LISTENING = re.compile(r"listening on (\S+?)(, tls)?[\"\s]")
_ACCESS = re.compile(r'^\S+ \S+ \S+ \[[^\]]*\] "(\S+) (\S+) HTTP/[\d.]+" (\d+) (\d+|-)', re.MULTILINE)
_ACCEPT = ", ".join(f"application/vnd.oci.image.{kind}.v1+json" for kind in ("manifest", "index"))


class Request(NamedTuple):
    """One request as the registry answered it; `size` is the bytes of the body."""

    method: str
    path: str
    status: int
    size: int

    @property
    def kind(self) -> str:
        """What was asked for: "manifest", "blob", "upload" or "other"."""
        for word, kind in (("/manifests/", "manifest"), ("/blobs/uploads/", "upload"), ("/blobs/", "blob")):
            if word in self.path:
                return kind
        return "other"

    @property
    def is_range(self) -> bool:
        """Whether a part of a blob was asked for and given."""
        return self.status == 206


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the registry asks for, by Basic authentication."""

    username: str
    password: str


class DockerRegistry:
    """The registry; `start` binds a free port at first and the same one at every later start.

    `host` must be an address of this machine, or of the network namespace that `prefix` enters: a command that
    is put before the registry's own and skopeo's. With `tls` the certificate in `ca` is for that address.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: bool = False,
        credentials: Credentials | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.directory = directory.resolve()
        self.host = host
        self.port = port
        self.tls = tls
        self.credentials = credentials
        self.storage = self.directory / "storage"
        self.ca = self.directory / "certificate.pem"
        self._key = self.directory / "key.pem"
        self._config = self.directory / "config.json"
        self._prefix = prefix
        self._service = Service(
            [*prefix, "docker-registry", "serve", self._config], log=self.directory / "registry.log"
        )

    @property
    def name(self) -> str:
        """`host:port`, as image references spell it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.tls else 'http'}://{self.name}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._service.pid

    def start(self) -> DockerRegistry:
        """Start it and return it once it answers. Raises AssertionError with its log when it cannot."""
        self.storage.mkdir(parents=True, exist_ok=True)
        if self.tls and not self.ca.exists():
            self._make_certificate()
        # JSON is YAML, and the standard library can write it.
        self.port = self.port or free_port()
        self._config.write_text(json.dumps(self._settings()))
        seen = len(_LISTENING.findall(self._service.log_text()))
        self._service.start()
        self._service.wait_ready(lambda: len(_LISTENING.findall(self._service.log_text())) > seen)
        return self

    def stop(self) -> None:
        """End it; its storage and port stay."""
        self._service.kill()

    def cleanup(self) -> None:
        """End it."""
        self._service.cleanup()

    def push(self, image: Image, repository: str, tag: str = "latest") -> str:
        """Push `image` by skopeo, byte for byte, and return its reference with the tag."""
        reference = f"{self.name}/{repository}:{tag}"
        command = [*self._prefix, "skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests"]
        command += ["--dest-tls-verify=false"]
        if self.credentials is not None:
            command += ["--dest-creds", f"{self.credentials.username}:{self.credentials.password}"]
        result = subprocess.run(
            [*command, image.source, f"docker://{reference}"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, f"skopeo copy to {reference}: {result.stderr}"
        return reference

    def mark(self) -> int:
        """Return a position in the access log, for `requests`."""
        return len(self._log())

    def requests(self, since: int = 0) -> list[Request]:
        """Return what was asked after `since` (see `mark`), in the order in which the answers ended."""
        # The registry writes an access line after the answer. It has written all of them when none of its threads
        # runs or wants to, however long it waited for a processor.
        wait_until(
            lambda: is_asleep(self.pid) and is_asleep(self.pid), timeout=60, what="the registry is at rest"
        )
        text = self._log()
        return [
            Request(method, path, int(status), 0 if size == "-" else int(size))
            for method, path, status, size in _ACCESS.findall(text[since:])
        ]

    def blob_path(self, digest: str) -> Path:
        """Return the file that holds a blob, for tests that damage or remove it."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"

    def get(self, path: str) -> bytes:
        """Return the body of a plain GET (no credentials). Raises urllib.error.URLError."""
        context = ssl.create_default_context(cafile=str(self.ca)) if self.tls else None
        request = urllib.request.Request(self.url + path, headers={"Accept": _ACCEPT + ", */*"})
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            body: bytes = answer.read()
            return body

    def _log(self) -> str:
        return self._service.log_text()

    def _settings(self) -> dict[str, object]:
        http: dict[str, object] = {"addr": f"{self.host}:{self.port}", "secret": secrets.token_hex(16)}
        if self.tls:
            http["tls"] = {"certificate": str(self.ca), "key": str(self._key)}
        settings: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": http,
        }
        if self.credentials is not None:
            users = self.directory / "htpasswd"
            users.write_text(f"{self.credentials.username}:{_bcrypt(self.credentials.password)}\n")
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(users)}}
        return settings

    def _make_certificate(self) -> None:
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-nodes",
                ),
                *(
                    "-days",
                    "2",
                    "-subj",
                    "/CN=registry under test",
                    "-addext",
                    f"subjectAltName=IP:{self.host}",
                ),
                *("-keyout", str(self._key), "-out", str(self.ca)),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )


def _bcrypt(password: str) -> str:
    """Return the only kind of hash that the registry takes; perl is in every Debian, a bcrypt module is not."""
    program = "print crypt($ARGV[0], q($2y$05$abcdefghijklmnopqrstuu))"
    result = subprocess.run(
        ["perl", "-e", program, password], check=True, capture_output=True, text=True, timeout=10
    )
    return result.stdout
