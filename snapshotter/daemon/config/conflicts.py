"""Values that are each right and cannot be right together. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator

from snapshotter.daemon.config.reference import KeyPath
from snapshotter.daemon.config.schema import Config
from snapshotter.daemon.config.sources import ParallelPullConfig


def conflicts(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key to change and what is wrong with it, for each conflict."""
    http, retry = config.http, config.blob_retry
    if http.max_wait_msec < http.min_wait_msec:
        yield ("http", "MaxWaitMsec"), f"must not be below MinWaitMsec ({http.min_wait_msec})"
    elif retry.max_wait < retry.first_wait:
        first = f"{retry.first_wait * 1000:g}"
        yield ("blob", "max_wait_msec"), f"must not be below min_wait_msec ({first}, of [blob] or [http])"
    yield from _parallel(config.pull_modes.parallel_pull_unpack)
    if config.metrics_address:
        yield from _metrics(config.metrics_address, config.metrics_network)


def _parallel(parallel: ParallelPullConfig) -> Iterator[tuple[KeyPath, str]]:
    limits = {
        "downloads": (parallel.max_concurrent_downloads, parallel.max_concurrent_downloads_per_image),
        "unpacks": (parallel.max_concurrent_unpacks, parallel.max_concurrent_unpacks_per_image),
    }
    for what, (total, each) in limits.items():
        if total >= 0 and not 0 <= each <= total:
            key = f"max_concurrent_{what}"
            allowed = (
                f"-1 or at least {key}_per_image ({each})" if each >= 0 else f"-1, as {key}_per_image is"
            )
            yield ("pull_modes", "parallel_pull_unpack", key), f"must be {allowed}, got {total}"


def _metrics(address: str, network: str) -> Iterator[tuple[KeyPath, str]]:
    if network == "unix":
        if not os.path.isabs(address):
            yield (
                ("metrics_address",),
                f'must be an absolute path with metrics_network "unix", got {address!r}',
            )
        return
    host, colon, port = address.rpartition(":")
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or bare_ipv6 or not (port.isascii() and port.isdigit() and int(port) < 65536):
        yield ("metrics_address",), f'must be "host:port" with metrics_network "tcp", got {address!r}'
