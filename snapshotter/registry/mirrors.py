"""Hosts as the configuration and containerd's directories name them together.

Mirrors of the configuration take the place of those in a directory; what the directory says of the registry itself
(authorities, certificates, headers, another server) holds either way. A mirror that is the registry itself is how
to say that it speaks plain HTTP.

Concurrency: one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from snapshotter.registry.hosts import PULL, RESOLVE, Host
from snapshotter.registry.hostsfile import HostsDirectories


class ConfiguredHosts:
    """`mirrors` by registry, in their order, before what `directories` know. See hosts.Hosts."""

    def __init__(
        self,
        mirrors: Mapping[str, Sequence[Host]],
        directories: HostsDirectories,
        *,
        plain_http: bool | None = None,
    ) -> None:
        self._mirrors = {registry: tuple(hosts) for registry, hosts in mirrors.items()}
        self._plain_http = plain_http
        self.directories = directories

    def of(self, registry: str) -> tuple[Host, ...]:
        """Return the hosts of `registry`, the registry itself last; never empty."""
        *found, own = self.directories.of(registry, plain_http=self._plain_http)
        configured = self._mirrors.get(registry)
        if configured is None:
            return (*found, own)
        mirrors = [
            replace(host, capabilities=frozenset({PULL, RESOLVE})) for host in configured if host.namespace
        ]
        for host in configured:
            if not host.namespace and not own.namespace:
                own = replace(own, scheme=host.scheme, path=host.path, timeout=host.timeout)
        return (*mirrors, own)
