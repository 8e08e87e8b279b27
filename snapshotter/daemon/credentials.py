"""Hosts and credentials of the daemon: made from the configuration, and their numbers for /metrics.

Keychains are asked in the reference's order: Docker's config.json, the cluster's secrets, what kubelet sent; then ECR by
itself, for what nobody else knows.

Concurrency: the tables are made once; the numbers are read by scrapes, from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from snapshotter.daemon.config import Config
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.hosts import NO_LIMIT, named_host
from snapshotter.registry.hostsfile import HostsDirectories
from snapshotter.registry.keychain import DockerConfigKeychain
from snapshotter.registry.keychains import ChainKeychain
from snapshotter.registry.mirrors import ConfiguredHosts


@dataclass(frozen=True, slots=True)
class Family:
    """Numbers of one name, by the values of `labels`."""

    name: str
    doc: str
    labels: tuple[str, ...]
    is_counter: bool = False
    rows: list[tuple[tuple[str, ...], float]] = field(default_factory=list)


class Credentials:
    """The keychains that the configuration asks for."""

    def __init__(self) -> None:
        self.keychain = ChainKeychain(docker=DockerConfigKeychain())


def configured_hosts(config: Config) -> ConfiguredHosts:
    """Return the hosts of `[resolver]`."""
    resolver = config.resolver
    mirrors = {
        registry: [
            named_host(
                registry, mirror.host, plain_http=mirror.insecure, timeout=_limit(mirror.request_timeout_sec)
            )
            for mirror in entry.mirrors
        ]
        for registry, entry in resolver.host.items()
    }
    directories = [Path(path) for path in resolver.config_path.split(":") if path]
    return ConfiguredHosts(mirrors, HostsDirectories(directories))


def registry_numbers(
    client: RegistryClient, hosts: ConfiguredHosts, credentials: Credentials
) -> Iterator[Family]:
    """Yield what is known of hosts and keychains. The hosts are those of the configuration and of images pulled."""
    requests = Family(
        "soci_registry_requests",
        "Calls of a registry's API, by what became of them.",
        ("host", "outcome"),
        True,
    )
    resting = Family("soci_registry_host_resting", "Whether a host is not asked for a while.", ("host",))
    for name, numbers in client.statistics().hosts.items():
        resting.rows.append(((name,), numbers.is_resting))
        requests.rows.extend(((name, outcome.value), count) for outcome, count in numbers.counts.items())
    mistakes = Family("soci_registry_hosts_mistakes", "Mistakes in files of hosts, as last read.", ("path",))
    mistakes.rows.extend(((path,), count) for path, count in list(hosts.directories.problems.items()))
    lookups = Family(
        "soci_keychain_lookups", "Lookups in a keychain, by what came of them.", ("keychain", "outcome"), True
    )
    failing = Family("soci_keychain_failing", "Whether a keychain's last lookup failed.", ("keychain",))
    for name, each in credentials.keychain.statistics.items():
        failing.rows.append(((name,), each.is_failing))
        outcomes = {"answer": each.answers, "none": each.misses, "failure": each.failures}
        lookups.rows.extend(((name, outcome), count) for outcome, count in outcomes.items())
    yield from (requests, resting, mistakes, lookups, failing)


def _limit(seconds: int) -> float | None:
    """Return the limit that the reference's request_timeout_sec means: 0 is the default, below it is none."""
    return NO_LIMIT if seconds < 0 else float(seconds) or None
