"""Hosts and credentials of the daemon: made from the configuration, and their numbers for /metrics.

Keychains are asked in the reference's order: Docker's config.json, the cluster's secrets, what kubelet sent; then ECR by
itself, for what nobody else knows.

Concurrency: the tables are made once; the numbers are read by scrapes, from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from snapshotter.daemon.config import Config
from snapshotter.registry import ecr
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.crikeychain import CriKeychain
from snapshotter.registry.ecr import EcrKeychain
from snapshotter.registry.hosts import NO_LIMIT, named_host
from snapshotter.registry.hostsfile import HostsDirectories
from snapshotter.registry.keychain import DockerConfigKeychain, Keychain
from snapshotter.registry.keychains import ChainKeychain
from snapshotter.registry.kubekeychain import KubeKeychain
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

    def __init__(self, config: Config) -> None:
        keychains: dict[str, Keychain] = {"docker": DockerConfigKeychain()}
        kubeconfig_keychain = config.kubeconfig_keychain
        self.kube: KubeKeychain | None = None
        if kubeconfig_keychain.enable_keychain:
            given = kubeconfig_keychain.kubeconfig_path
            path = Path(given) if given else None
            keychains["kubernetes"] = self.kube = KubeKeychain(path)
        self.cri = CriKeychain() if config.cri_keychain.enable_keychain else None
        if self.cri is not None:
            keychains["cri"] = self.cri
        self.ecr = EcrKeychain() if ecr.is_available() else None
        if self.ecr is not None:
            keychains["ecr"] = self.ecr
        self.keychain = ChainKeychain(**keychains)

    async def run(self) -> None:
        """Keep credentials fresh, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.ecr is not None:
                nursery.start_soon(self.ecr.run)
            if self.kube is not None:
                nursery.start_soon(self.kube.run)


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
        outcomes = {
            "answer": each.answers,
            "none": each.misses,
            "refused": each.refusals,
            "failure": each.failures,
        }
        lookups.rows.extend(((name, outcome), count) for outcome, count in outcomes.items())
    yield from (requests, resting, mistakes, lookups, failing)
    if credentials.kube is not None:
        yield from _secrets(credentials.kube)
    if credentials.ecr is not None:
        yield from _tokens(credentials.ecr)


def _secrets(keychain: KubeKeychain) -> Iterator[Family]:
    numbers = keychain.statistics
    synced = Family("soci_kubernetes_synced", "Whether the pull secrets were read.", ())
    synced.rows.append(((), numbers.is_synced))
    secrets = Family("soci_kubernetes_secrets", "Pull secrets known.", ())
    secrets.rows.append(((), numbers.secrets))
    failures = Family("soci_kubernetes_failures", "Lists and watches that failed.", (), True)
    failures.rows.append(((), numbers.failures))
    yield from (synced, secrets, failures)


def _tokens(keychain: EcrKeychain) -> Iterator[Family]:
    age = Family("soci_credential_age_seconds", "Time since a token was given out.", ("host",))
    left = Family("soci_credential_left_seconds", "Time until it ends; below 0 it has.", ("host",))
    renewals = Family("soci_credential_renewals", "Tokens renewed.", ("host",), True)
    failures = Family("soci_credential_renewal_failures", "Renewals that failed.", ("host",), True)
    now = time.time()
    for host, state in keychain.states():
        age.rows.append(((host,), now - state.issued_at))
        left.rows.append(((host,), state.expires_at - now))
        renewals.rows.append(((host,), state.renewals))
        failures.rows.append(((host,), state.failures))
    yield from (age, left, renewals, failures)


def _limit(seconds: int) -> float | None:
    """Return the limit that the reference's request_timeout_sec means: 0 is the default, below it is none."""
    return NO_LIMIT if seconds < 0 else float(seconds) or None
