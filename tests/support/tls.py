"""Certificates for servers in tests, made on the spot by the openssl command."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """A self-signed certificate: what a server presents and what a client that trusts it loads."""

    certificate: Path
    key: Path

    @property
    def ca_file(self) -> Path:
        """What to give to a client as its CA file."""
        return self.certificate


def make_certificate(directory: Path, names: Sequence[str] = ("127.0.0.1", "localhost")) -> Certificate:
    """Return a certificate for `names` (host names or addresses), valid for two days, in `directory`."""
    certificate, key = directory / "server.crt", directory / "server.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={_names(names)}"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return Certificate(certificate, key)


def _names(names: Sequence[str]) -> str:
    return ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
