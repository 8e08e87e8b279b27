"""Every setting of the daemon, with its one default.

`Config()` *is* the default configuration; the classes nest as the TOML does. Keys of the reference
snapshotter keep its names, units and defaults (the exceptions are said where they stand); our own have the
unit in the name. Values that the reference gives in milliseconds are offered in seconds by properties: code
reads those.

Instances are frozen. No I/O here; `loading.py` makes them from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshotter import logs
from snapshotter.daemon.config.keys import value
from snapshotter.daemon.config.sources import (
    BlobConfig,
    ContentStoreConfig,
    CriKeychainConfig,
    HttpConfig,
    KubeconfigKeychainConfig,
    PrefetchConfig,
    PullModesConfig,
    ResolverConfig,
    Retry,
)

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FuseConfig:
    """Serving files. The reference's timeouts of attributes and entries have no place: layers never change."""

    idle_timeout_sec: float = value(
        60.0,
        "A layer nobody has read for this long keeps its mount but no process.",
        unit="seconds",
        minimum=0.1,
    )
    read_ahead_kb: int = value(
        512, "The kernel's readahead on a lazy mount.", unit="KiB", minimum=0, maximum=65536
    )
    getxattr_unsupported: bool = value(
        True,
        "Have the kernel ask layers without extended attributes for one only once, by answering that they are not"
        " supported; otherwise at each lookup. false where containers are committed (docker, nerdctl): that compares"
        " attributes, and takes the answer for an error.",
    )
    read_budget_sec: float = value(
        60.0,
        "Longest time one read may wait for the registry; then it fails with EIO and the next one tries afresh.",
        unit="seconds",
        minimum=1,
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Disk used by the files of layers."""

    max_bytes: int = value(
        0, "Cap for all layers together; least recently used goes first; 0: no cap.", unit="bytes", minimum=0
    )
    min_free_bytes: int = value(
        # Not measured: enough for containerd's database and the host's logs to go on.
        256 * MIB,
        "Space on the disk that the cache leaves to others; below it reads are served from memory.",
        unit="bytes",
        minimum=0,
    )


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """The process that fetches spans."""

    ondemand_connections: int = value(
        # Four loopback connections moved 1.9 GB/s (one: 1.6); more is for registries that cap each connection.
        4,
        "Connections for reads that somebody waits for.",
        minimum=1,
        maximum=256,
    )
    background_connections: int = value(4, "Connections for everything else.", minimum=1, maximum=256)
    inflight_max_bytes: int = value(
        64 * MIB, "Memory for spans being fetched and inflated.", unit="bytes", minimum=MIB
    )
    unreachable: str = value(
        "wait",
        "What a read does while the registry of its layer does not answer: wait, up to [fuse] read_budget_sec, or eio: "
        "fail at once, as soon as the registry has failed some times in a row.",
        choices=("wait", "eio"),
    )
    background: bool = value(
        True, "Fetch what nobody has asked for yet (as the reference's [background_fetch] disable = false)."
    )
    max_background_bytes_per_sec: int = value(
        0, "Cap on background transfer; 0: what the link gives.", unit="bytes per second", minimum=0
    )
    max_background_bytes_per_sec_per_image: int = value(
        0, "The same for each image by itself; 0: none.", unit="bytes per second", minimum=0
    )


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Compiling zTOCs, which are foreign bytes, in a process of its own."""

    compile_memory_max_bytes: int = value(
        # A million files take 1.0 GB (docs/performance.md): room for that, and too little to hurt a host.
        1024 * MIB,
        "Memory that compiling one zTOC may take; beyond it the layer is not lazy.",
        unit="bytes",
        minimum=64 * MIB,
    )
    compile_timeout_sec: float = value(
        60.0, "Time that compiling one zTOC may take.", unit="seconds", minimum=1
    )


@dataclass(frozen=True, slots=True)
class SnapshotterConfig:
    """The snapshots themselves."""

    min_layer_size: int = value(
        0,
        "Smaller layers are pulled in full (needs a client that tells sizes, as nerdctl does).",
        unit="bytes",
        minimum=0,
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    log_level: str = value(
        "info", "Least level that is logged.", choices=tuple(logs.LEVELS), zero_is_default=True
    )
    log_format: str = value(
        "auto",
        "Form of a log line: JSON, or JSON after the journal's priority prefix; auto asks what stderr is.",
        choices=logs.FORMATS,
    )
    metrics_address: str = value(
        "",
        "Where /metrics listens: host:port, or a socket's path; empty: nowhere.",
        form='"host:port" or an absolute path',
    )
    metrics_network: str = value(
        "tcp", "Kind of metrics_address.", choices=("tcp", "unix"), zero_is_default=True
    )
    no_prometheus: bool = value(False, "Serve no metrics even when there is an address.")
    mount_timeout_sec: int = value(
        30,
        "Longest time to find index and zTOC of a layer; then it is pulled in full.",
        unit="seconds",
        minimum=0,
        zero_is_default=True,
    )
    max_concurrency: int = value(
        100,
        "Layers of an image whose zTOCs are fetched and compiled at once, ahead of their use: never more than 8, for the "
        "sake of memory; below 0: 8.",
        zero_is_default=True,
    )
    http: HttpConfig = field(default_factory=HttpConfig)
    blob: BlobConfig = field(default_factory=BlobConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    layer: LayerConfig = field(default_factory=LayerConfig)
    snapshotter: SnapshotterConfig = field(default_factory=SnapshotterConfig)
    content_store: ContentStoreConfig = field(default_factory=ContentStoreConfig)
    pull_modes: PullModesConfig = field(default_factory=PullModesConfig)
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    resolver: ResolverConfig = field(default_factory=ResolverConfig)
    kubeconfig_keychain: KubeconfigKeychainConfig = field(default_factory=KubeconfigKeychainConfig)
    cri_keychain: CriKeychainConfig = field(default_factory=CriKeychainConfig)

    @property
    def blob_retry(self) -> Retry:
        """How ranges of blobs are asked for again: [blob], and [http] where that says 0."""
        blob, http = self.blob, self.http
        return Retry(
            1 + max(blob.max_retries or http.max_retries, 0),
            (blob.min_wait_msec or http.min_wait_msec) / 1000,
            (blob.max_wait_msec or http.max_wait_msec) / 1000,
        )
