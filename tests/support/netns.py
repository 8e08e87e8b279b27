"""Two hosts on one machine, and a link between them that can be slow, lossy or cut; or one host, alone.

Three network namespaces: `client` and `server`, and between them one that holds the link (see `netem`). Commands
enter a host by nsenter, which leaves mounts alone: `ip netns exec` would mount /sys anew and hide the cgroups.

Owns its namespaces and the link's process. Concurrency: one thread drives it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support import netem
from tests.support.netem import Link

_NAMESPACES = Path("/run/netns")


class Host(NamedTuple):
    """One of the two hosts."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that is put before another, to run it on this host."""
        return ("nsenter", f"--net={_NAMESPACES / self.namespace}", "--")


class Network:
    """A context manager: `with Network(directory, Link(delay=0.01)) as network:`; needs root."""

    def __init__(self, directory: Path, link: Link | None = None) -> None:
        mark = secrets.token_hex(3)
        self.client = Host(f"st-{mark}-client", "192.0.2.1")
        self.server = Host(f"st-{mark}-server", "192.0.2.2")
        self._middle = f"st-{mark}-link"
        self._settings = directory / f"link-{mark}.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.shape(link or Link())

    def shape(self, link: Link) -> None:
        """Give the link other properties; they hold within 0.2 s."""
        temporary = self._settings.with_suffix(".new")
        temporary.write_text(link.to_json())
        os.replace(temporary, self._settings)

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    def _make(self) -> None:
        for namespace in (self.client.namespace, self.server.namespace, self._middle):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        for host, port in ((self.client, "port0"), (self.server, "port1")):
            _ip(
                *("link", "add", "eth0", "netns", host.namespace, "type", "veth"),
                *("peer", port, "netns", self._middle),
            )
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", self._middle, "link", "set", port, "up", "promisc", "on")
        middle = Host(self._middle, "")
        program = [
            *middle.prefix,
            sys.executable,
            "-I",
            netem.__file__,
            "port0",
            "port1",
            str(self._settings),
        ]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.read(1) == b"+", "the link did not start"

    def cleanup(self) -> None:
        """End the link and remove the namespaces; what still runs in one keeps it alive, unreachable."""
        if self._process is not None:
            # Closing its input is the order to end.
            self._process.communicate(timeout=60)
            self._process = None
        for namespace in (self.client.namespace, self.server.namespace, self._middle):
            if (_NAMESPACES / namespace).exists():
                _ip("netns", "delete", namespace)
        self._settings.unlink(missing_ok=True)


class LoneHost:
    """A context manager: one host in a network namespace of its own, at an address that counts as no loopback."""

    def __init__(self) -> None:
        self.host = Host(f"st-{secrets.token_hex(3)}-alone", "192.0.2.1")

    def __enter__(self) -> Self:
        _ip("netns", "add", self.host.namespace)
        try:
            _ip("-n", self.host.namespace, "link", "set", "lo", "up")
            _ip("-n", self.host.namespace, "addr", "add", f"{self.host.address}/32", "dev", "lo")
        except BaseException:
            _ip("netns", "delete", self.host.namespace)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ip("netns", "delete", self.host.namespace)


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr}"
