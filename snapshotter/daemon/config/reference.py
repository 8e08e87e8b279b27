"""Keys of the reference snapshotter that are not simply fields of `Config`.

A configuration file of the reference, of any version up to 0.15, must load here. Its keys fall in three lots:

- with their meaning: fields of `schema.Config` under the same name;
- `RENAMED`: with their meaning, kept under a name of ours, so that one thing has one key;
- `WITHOUT_EFFECT`: accepted and type-checked, then dropped. What they tune is something this snapshotter does
  not have on purpose; one warning names all that a file sets.

Data only. A test holds these lists against the full list of the reference's keys.
"""

from __future__ import annotations

from typing import NamedTuple

KeyPath = tuple[str, ...]
"""Names from the top of the file."""


class Dropped(NamedTuple):
    """A key without effect: the type it must still have, and what makes it pointless."""

    type: type[bool | int | str]
    reason: str


_FOR_EVER = "Layers never change: the kernel may keep what it has been told for ever."
_ONE_CACHE = "One cache on disk for all layers, sized by [cache]; the kernel's page cache stands before it."
_NO_QUEUE = "No layer is ever dropped from the background."
_NO_METADATA_STORE = (
    "A zTOC is compiled once into a file that is mapped, not read; there is no metadata database."
)
_OFFLINE = "A layer stays available while its registry is away; reads that need it wait for it."
_ONE_TOKEN = "Tokens are shared by all images of a host and live as long as the registry says."

WITHOUT_EFFECT: dict[KeyPath, Dropped] = {
    ("http_cache_type",): Dropped(str, _ONE_CACHE),
    ("filesystem_cache_type",): Dropped(str, _ONE_CACHE),
    ("resolve_result_entry",): Dropped(int, "What is known of a layer is kept on disk, for all layers."),
    ("debug",): Dropped(bool, 'Use log_level = "debug".'),
    ("disable_verification",): Dropped(
        bool, "A file is checked at its first read; that costs next to nothing."
    ),
    ("allow_no_verification",): Dropped(bool, "Bytes are served only after their digest was checked."),
    ("fuse_metrics_emit_wait_duration_sec",): Dropped(int, "Counters are read when /metrics is asked."),
    ("debug_address",): Dropped(str, "There is no profiler to listen for."),
    ("metadata_store",): Dropped(str, _NO_METADATA_STORE),
    ("metadata_db_no_sync",): Dropped(bool, _NO_METADATA_STORE),
    ("metadata_insertion_chunk_size",): Dropped(int, _NO_METADATA_STORE),
    ("skip_check_snapshotter_supported",): Dropped(
        bool, "The check at start takes milliseconds and never stops the daemon."
    ),
    ("blob", "valid_interval"): Dropped(int, _OFFLINE),
    ("blob", "check_always"): Dropped(bool, _OFFLINE),
    ("blob", "force_single_range_mode"): Dropped(bool, "No request ever asks for more than one range."),
    ("directory_cache", "max_lru_cache_entry"): Dropped(int, _ONE_CACHE),
    ("directory_cache", "max_cache_fds"): Dropped(int, _ONE_CACHE),
    ("directory_cache", "sync_add"): Dropped(bool, _ONE_CACHE),
    ("directory_cache", "direct"): Dropped(bool, _ONE_CACHE),
    ("fuse", "attr_timeout"): Dropped(int, _FOR_EVER),
    ("fuse", "entry_timeout"): Dropped(int, _FOR_EVER),
    ("fuse", "negative_timeout"): Dropped(int, _FOR_EVER),
    ("fuse", "log_fuse_operations"): Dropped(
        bool,
        "Paths of images are confidential; `soci trace` shows what a start reads, and strace any process.",
    ),
    ("prefetch", "max_concurrency"): Dropped(
        int,
        "No mount waits for it: it is what the background begins with, within [fetch]'s connections and caps.",
    ),
    ("background_fetch", "silence_period_msec"): Dropped(
        int, "The background starts at once and yields to readers; see [fetch]."
    ),
    ("background_fetch", "fetch_period_msec"): Dropped(
        int, "The background takes what the link has to spare; see [fetch] max_background_bytes_per_sec."
    ),
    ("background_fetch", "max_queue_size"): Dropped(int, _NO_QUEUE),
    ("background_fetch", "drop_policy"): Dropped(str, _NO_QUEUE),
    ("background_fetch", "emit_metric_period_sec"): Dropped(int, "Counters are read when /metrics is asked."),
    ("content_store", "namespace"): Dropped(str, "The namespace comes with each request of containerd."),
    ("resolver", "auth_client_ttl_sec"): Dropped(int, _ONE_TOKEN),
    ("resolver", "enable_auth_client_sharing"): Dropped(bool, _ONE_TOKEN),
    ("snapshotter", "allow_invalid_mounts_on_restart"): Dropped(
        bool, "A start needs neither network nor credentials, and one bad layer never stops it."
    ),
}

RENAMED: dict[KeyPath, str] = {
    ("background_fetch", "disable"): "true is [fetch] background = false",
}


def named(path: tuple[str | int, ...]) -> str:
    """Return a key's name for people: `[blob] max_retries`, or the bare name for one at the top of the file."""
    tables = [_quoted(str(part)) for part in path[:-1] if isinstance(part, str)]
    if not tables:
        return str(path[-1])
    entry = "".join(f" (entry {part + 1})" for part in path[:-1] if isinstance(part, int))
    return f"[{'.'.join(tables)}]{entry} {path[-1]}"


def table_named(path: tuple[str | int, ...]) -> str:
    """Return a table's name for people: `[pull_modes.soci_v1]`."""
    return f"[{'.'.join(_quoted(str(part)) for part in path if isinstance(part, str))}]"


def _quoted(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else f'"{name}"'
