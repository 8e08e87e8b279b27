"""Settings of where bytes come from: registries, credentials, containerd, and the ways to pull.

Part of `schema.py`, whose rules hold here too: defaults are the values of the classes, instances are frozen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from snapshotter.daemon.config.keys import parse_size, table_list, table_map, text_list, value

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"


_PATH = "an absolute path"
_SOCKET = "an absolute path, with or without unix://"
_SIZE = 'a size such as "8mb" (b, kb, mb, gb; of 1024), or empty'


def _absolute_path(text: str) -> str:
    if not os.path.isabs(text) or "\0" in text:
        raise ValueError(text)
    return text


def _path_or_nothing(text: str) -> str:
    return _absolute_path(text) if text else text


def _search_path(text: str) -> str:
    return ":".join(_absolute_path(part) for part in text.split(":")) if text else text


def _socket_path(text: str) -> str:
    return _absolute_path(text.removeprefix("unix://"))


def _chunk_size(text: str) -> str:
    if text and parse_size(text) is None:
        raise ValueError(text)
    return text


def _host(text: str) -> str:
    if not text or any(letter.isspace() for letter in text):
        raise ValueError(text)
    parts = urlsplit(text if "://" in text else f"https://{text}")
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise ValueError(text)
    _ = parts.port  # raises ValueError for one that is no number
    return text


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Limits of every request to a registry (the reference's names, in its spelling)."""

    dial_timeout_msec: int = value(
        3000,
        "Longest time to connect.",
        key="DialTimeoutMsec",
        unit="milliseconds",
        minimum=0,
        zero_is_default=True,
    )
    response_header_timeout_msec: int = value(
        3000,
        "Longest wait for the head of a reply.",
        key="ResponseHeaderTimeoutMsec",
        unit="milliseconds",
        minimum=0,
        zero_is_default=True,
    )
    request_timeout_msec: int = value(
        300_000,
        "Longest time of one whole attempt.",
        key="RequestTimeoutMsec",
        unit="milliseconds",
        minimum=0,
        zero_is_default=True,
    )
    max_retries: int = value(
        8, "Attempts after the first; -1: none.", key="MaxRetries", minimum=-1, zero_is_default=True
    )
    min_wait_msec: int = value(
        30,
        "Wait before the second attempt; it doubles from there.",
        key="MinWaitMsec",
        unit="milliseconds",
        minimum=0,
        zero_is_default=True,
    )
    max_wait_msec: int = value(
        300_000,
        "Longest wait between attempts.",
        key="MaxWaitMsec",
        unit="milliseconds",
        minimum=0,
        zero_is_default=True,
    )

    @property
    def dial_timeout(self) -> float:
        """Seconds."""
        return self.dial_timeout_msec / 1000

    @property
    def response_header_timeout(self) -> float:
        """Seconds."""
        return self.response_header_timeout_msec / 1000

    @property
    def request_timeout(self) -> float:
        """Seconds."""
        return self.request_timeout_msec / 1000

    @property
    def retry(self) -> Retry:
        """How manifests, indices and zTOCs are asked for again."""
        return Retry(1 + max(self.max_retries, 0), self.min_wait_msec / 1000, self.max_wait_msec / 1000)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often something is tried in all (>= 1), and the shortest and longest wait between (seconds)."""

    attempts: int
    first_wait: float
    max_wait: float


@dataclass(frozen=True, slots=True)
class BlobConfig:
    """Ranged reads of layer blobs; 0 means "as in [http]" where it says so."""

    fetching_timeout_sec: int = value(
        300, "Longest time of one range request.", unit="seconds", minimum=0, zero_is_default=True
    )
    max_retries: int = value(0, "Attempts after the first; -1: none; 0: as [http] MaxRetries.", minimum=-1)
    min_wait_msec: int = value(0, "As [http] MinWaitMsec; 0: that value.", unit="milliseconds", minimum=0)
    max_wait_msec: int = value(0, "As [http] MaxWaitMsec; 0: that value.", unit="milliseconds", minimum=0)
    max_span_verification_retries: int = value(
        # The reference's 0 would make an error of the program out of one byte that a proxy has broken.
        2,
        "Fetches after the first of a span whose bytes have the wrong digest; -1: three; 0: two.",
        minimum=-1,
        zero_is_default=True,
    )

    @property
    def span_refetches(self) -> int:
        """How often a span with a wrong digest is fetched again."""
        return 3 if self.max_span_verification_retries < 0 else self.max_span_verification_retries


@dataclass(frozen=True, slots=True)
class ContentStoreConfig:
    """Where artifacts are that are on the host already; as `soci --content-store`. The registry is asked after it."""

    type: str = value(
        "soci",
        "containerd: its content store; soci: what is below --root.",
        choices=("soci", "containerd"),
        zero_is_default=True,
    )
    containerd_address: str = value(
        CONTAINERD_SOCKET,
        "Socket of the containerd whose content store that is.",
        zero_is_default=True,
        form=_SOCKET,
        convert=_socket_path,
    )


@dataclass(frozen=True, slots=True)
class PrefetchConfig:
    """Prefetch artifacts of an index."""

    enable: bool = value(
        False,
        "Let the background begin with the spans that the index says are needed first (soci create --prefetch-file), as "
        "long as no container on this host has shown which those are.",
    )


@dataclass(frozen=True, slots=True)
class SociV1Config:
    """Indices found through the registry's list of referrers."""

    enable: bool = value(
        # The reference says false since its 0.10, and its users' images silently stopped being lazy. An index
        # is only used when its layers match the image, so looking costs one request and risks nothing.
        True,
        "Look for v1 indices among the image's referrers. The reference's default is false: with it an image "
        "that has an index is silently pulled in full.",
    )


@dataclass(frozen=True, slots=True)
class SociV2Config:
    """Indices named by an annotation of the image manifest."""

    enable: bool = value(True, "Use v2 indices, which the image itself names.")


@dataclass(frozen=True, slots=True)
class DecompressorConfig:
    """An external program that inflates layers."""

    path: str = value("", "The program.", required=True, form=_PATH, convert=_absolute_path)
    args: tuple[str, ...] = text_list("Its arguments; no shell.")


@dataclass(frozen=True, slots=True)
class ParallelPullConfig:
    """Fast ordinary pulls of what is not lazy. A failure leaves the image to containerd."""

    enable: bool = value(False, "Pull every image this way and none lazily.")
    experimental_parallel_pull_as_fallback: bool = value(
        True,
        "Pull images without an index this way; needs [content_store] containerd_address, or discard_unpacked_layers.",
    )
    max_concurrent_downloads: int = value(-1, "Downloads at once in the daemon; -1: no limit.", minimum=-1)
    max_concurrent_downloads_per_image: int = value(
        3, "Downloads at once of one image; -1: no limit.", minimum=-1
    )
    concurrent_download_chunk_size: str = value(
        "", "Size of one range request, at most 32mb; empty: 8mb.", form=_SIZE, convert=_chunk_size
    )
    max_concurrent_unpacks: int = value(
        -1, "Layers unpacked at once in the daemon; -1: no limit.", minimum=-1
    )
    max_concurrent_unpacks_per_image: int = value(
        1, "Layers unpacked at once of one image; -1: no limit.", minimum=-1
    )
    discard_unpacked_layers: bool = value(False, "Do not keep the compressed layers in containerd.")
    decompress_streams: Mapping[str, DecompressorConfig] = table_map(
        DecompressorConfig,
        "Programs that inflate layers in our place, from stdin to stdout, by compression. Measure before: without any, "
        "layers are inflated by ISA-L.",
        name="compression",
        names=("gzip", "zstd"),
        sample="[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\n"
        'path = "/usr/bin/unpigz"\nargs = ["-c"]\n',
    )

    @property
    def download_chunk_bytes(self) -> int:
        """Bytes of one range request; 0: the whole layer in one."""
        return parse_size(self.concurrent_download_chunk_size) or 0


@dataclass(frozen=True, slots=True)
class PullModesConfig:
    """Ways to pull."""

    soci_v1: SociV1Config = field(default_factory=SociV1Config)
    soci_v2: SociV2Config = field(default_factory=SociV2Config)
    parallel_pull_unpack: ParallelPullConfig = field(default_factory=ParallelPullConfig)


@dataclass(frozen=True, slots=True)
class KubeconfigKeychainConfig:
    """Registry credentials from secrets of a Kubernetes cluster."""

    enable_keychain: bool = value(False, "Use the cluster's image pull secrets.")
    kubeconfig_path: str = value(
        "", "The kubeconfig; empty: the usual places.", form=f"{_PATH}, or empty", convert=_path_or_nothing
    )


@dataclass(frozen=True, slots=True)
class CriKeychainConfig:
    """Registry credentials that kubelet sends with its pulls."""

    enable_keychain: bool = value(False, "Be kubelet's image service and remember its credentials.")
    image_service_path: str = value(
        CONTAINERD_SOCKET,
        "Socket of the image service behind us.",
        zero_is_default=True,
        form=_SOCKET,
        convert=_socket_path,
    )


@dataclass(frozen=True, slots=True)
class MirrorConfig:
    """One host that is asked before the registry itself."""

    host: str = value(
        "", "The host that is asked.", required=True, form="a host name, host:port or URL", convert=_host
    )
    insecure: bool = value(False, "Plain HTTP.")
    request_timeout_sec: int = value(
        0, "Longest time of one request; 0: as [http]; below 0: no limit.", unit="seconds"
    )


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How one registry is reached."""

    mirrors: tuple[MirrorConfig, ...] = table_list(MirrorConfig, "In the order in which they are asked.")


@dataclass(frozen=True, slots=True)
class ResolverConfig:
    """Hosts of registries."""

    config_path: str = value(
        # What containerd 2 looks at, and its clients; containerd 1 does so once its config_path is set.
        "/etc/containerd/certs.d:/etc/docker/certs.d",
        "containerd's directories of hosts.toml, separated by colons; empty: none. [resolver.host] comes first.",
        form="absolute paths separated by colons, or empty",
        convert=_search_path,
    )
    host: Mapping[str, HostConfig] = table_map(
        HostConfig,
        "Mirrors, by registry.",
        name="registry",
        sample='[[resolver.host."registry.example.com".mirrors]]\n'
        'host = "https://mirror.example.com"\ninsecure = false\nrequest_timeout_sec = 0\n',
    )
