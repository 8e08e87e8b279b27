"""A signature that was made before an image was indexed is valid afterwards: a v1 index does not touch the image.

skopeo signs with a GPG key while it pushes, and later pulls under a policy that takes nothing unsigned.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Soci
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder

ALL = ("--min-layer-size", "0")
SIGNER = "signer@example.org"


class Signing:
    """A key, the place of its signatures, and a policy that wants them."""

    def __init__(self, directory: Path) -> None:
        self._home = directory / "gnupg"
        self._home.mkdir(mode=0o700)
        self._signatures = directory / "registries.d"
        self._policy = directory / "policy.json"
        self._run("gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key", SIGNER, "ed25519")
        public = directory / "key.gpg"
        self._run("gpg", "--batch", "--output", public, "--export", SIGNER)
        self._signatures.mkdir()
        place = f"file://{directory}/signatures"
        (self._signatures / "default.yaml").write_text(
            f"default-docker:\n  sigstore: {place}\n  sigstore-staging: {place}\n"
        )
        wanted = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(public)}
        self._policy.write_text(json.dumps({"default": [wanted]}))

    def push(self, image: Image, reference: str) -> None:
        """Push an image with its signature."""
        options = ["--sign-by", SIGNER, "--dest-tls-verify=false"]
        self._run(
            "skopeo",
            *self._where(),
            "--insecure-policy",
            "copy",
            *options,
            image.source,
            f"docker://{reference}",
        )

    def refusal(self, reference: str, target: Path) -> str:
        """Pull an image under the policy; return why that was not possible, nothing when it was."""
        pull = ["copy", "--src-tls-verify=false", f"docker://{reference}", f"dir:{target}"]
        done = self._run("skopeo", *self._where(), "--policy", self._policy, *pull, check=False)
        return done.stderr if done.returncode else ""

    def close(self) -> None:
        """End GPG's agent."""
        self._run("gpgconf", "--kill", "all")

    def _where(self) -> list[str | Path]:
        return ["--registries.d", self._signatures]

    def _run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GNUPGHOME": str(self._home)}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert not (check and done.returncode), f"{command}: {done.stderr}"
        return done


@pytest.fixture
def signing(workdir: Path) -> Iterator[Signing]:
    signing = Signing(workdir)
    try:
        yield signing
    finally:
        signing.close()


def test_a_signature_stays_valid(
    signing: Signing, soci: Soci, docker_registry: DockerRegistry, workdir: Path, tmp_path: Path
) -> None:
    image = ImageBuilder(tmp_path / "image").layer({"a": os.urandom(50_000)}).build()
    local, remote = (f"{docker_registry.name}/signed/{way}:1" for way in ("local", "remote"))
    for reference in (local, remote):
        signing.push(image, reference)
    soci("image", "rpull", "--snapshotter", "overlayfs", local)
    soci("create", *ALL, local)
    soci("push", local)
    soci("create", *ALL, "--registry", remote)
    for number, reference in enumerate((local, remote)):
        assert soci("index", "verify", "--registry", reference).out.endswith("ok\n")
        assert signing.refusal(reference, workdir / str(number)) == ""
    soci("convert", *ALL, "--registry", local, f"{local}-soci")
    assert "signature was required" in signing.refusal(f"{local}-soci", workdir / "converted")
