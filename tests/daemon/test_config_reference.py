"""Every key of the reference snapshotter is accepted, and each is told apart by what becomes of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from snapshotter.daemon.config import Config, dump, load
from snapshotter.daemon.config.reading import all_keys
from snapshotter.daemon.config.reference import RENAMED, WITHOUT_EFFECT

# Table by table: keys and defaults of version 0.15, as its `config default` prints them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "http_cache_type": "",
        "filesystem_cache_type": "",
        "resolve_result_entry": 0,
        "debug": False,
        "disable_verification": False,
        "max_concurrency": 100,
        "mount_timeout_sec": 30,
        "fuse_metrics_emit_wait_duration_sec": 60,
        "metrics_address": "",
        "metrics_network": "tcp",
        "no_prometheus": False,
        "debug_address": "",
        "metadata_store": "db",
        "metadata_db_no_sync": False,
        "metadata_insertion_chunk_size": 0,
        "skip_check_snapshotter_supported": False,
    },
    "http": {
        "DialTimeoutMsec": 3000,
        "ResponseHeaderTimeoutMsec": 3000,
        "RequestTimeoutMsec": 300000,
        "MaxRetries": 8,
        "MinWaitMsec": 30,
        "MaxWaitMsec": 300000,
    },
    "blob": {
        "valid_interval": 60,
        "fetching_timeout_sec": 300,
        "max_retries": 8,
        "min_wait_msec": 30,
        "max_wait_msec": 300000,
        "check_always": False,
        "force_single_range_mode": False,
        "max_span_verification_retries": 0,
    },
    "directory_cache": {
        "max_lru_cache_entry": 0,
        "max_cache_fds": 0,
        "sync_add": False,
        "direct": True,
    },
    "fuse": {
        "attr_timeout": 1,
        "entry_timeout": 1,
        "negative_timeout": 1,
        "log_fuse_operations": False,
    },
    "background_fetch": {
        "disable": False,
        "silence_period_msec": 30000,
        "fetch_period_msec": 500,
        "max_queue_size": 300,
        "drop_policy": "newest",
        "emit_metric_period_sec": 10,
    },
    "content_store": {"type": "soci", "containerd_address": "/run/containerd/containerd.sock"},
    "prefetch": {"enable": False, "max_concurrency": 0},
    "pull_modes.soci_v1": {"enable": False},
    "pull_modes.soci_v2": {"enable": True},
    "pull_modes.parallel_pull_unpack": {
        "max_concurrent_downloads": -1,
        "max_concurrent_downloads_per_image": 3,
        "concurrent_download_chunk_size": "",
        "max_concurrent_unpacks": -1,
        "max_concurrent_unpacks_per_image": 1,
        "discard_unpacked_layers": False,
        "enable": False,
        "experimental_parallel_pull_as_fallback": False,
    },
    "kubeconfig_keychain": {"enable_keychain": False, "kubeconfig_path": ""},
    "cri_keychain": {"enable_keychain": False, "image_service_path": "/run/containerd/containerd.sock"},
    "resolver": {"auth_client_ttl_sec": 3600, "enable_auth_client_sharing": False},
    "snapshotter": {"min_layer_size": 0, "allow_invalid_mounts_on_restart": False},
}

# Keys without a default, or of older versions only.
OTHERS = {
    ("allow_no_verification",),
    ("content_store", "namespace"),
    ("pull_modes", "parallel_pull_unpack", "decompress_streams", "path"),
    ("pull_modes", "parallel_pull_unpack", "decompress_streams", "args"),
    ("resolver", "host", "mirrors", "host"),
    ("resolver", "host", "mirrors", "insecure"),
    ("resolver", "host", "mirrors", "request_timeout_sec"),
}

KEYS = {
    (*table.split("."), key) if table else (key,) for table, keys in DEFAULTS.items() for key in keys
} | OTHERS


def toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def default_file() -> str:
    lines = []
    for table, keys in DEFAULTS.items():
        lines += [f"[{table}]"] * bool(table)
        lines += [f"{key} = {toml(value)}" for key, value in keys.items()]
    return "\n".join(lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_every_key_is_known() -> None:
    assert set(all_keys()) >= KEYS


def test_no_key_is_said_to_be_the_references_that_is_not() -> None:
    assert set(WITHOUT_EFFECT) | set(RENAMED) <= KEYS


def test_the_lots_do_not_overlap() -> None:
    assert len(list(all_keys())) == len(set(all_keys()))
    assert not set(WITHOUT_EFFECT) & set(RENAMED)


def test_its_default_file_means_our_defaults(file: Path) -> None:
    file.write_text(default_file())
    loaded = load(file, explicit=True)
    blob = dataclasses.replace(Config().blob, max_retries=8, min_wait_msec=30, max_wait_msec=300_000)
    modes = Config().pull_modes
    off = dataclasses.replace(
        modes,
        soci_v1=dataclasses.replace(modes.soci_v1, enable=False),
        parallel_pull_unpack=dataclasses.replace(
            modes.parallel_pull_unpack, experimental_parallel_pull_as_fallback=False
        ),
    )
    assert loaded.config == dataclasses.replace(Config(), blob=blob, pull_modes=off)
    assert loaded.config.blob_retry == Config().blob_retry


def test_its_default_file_gives_one_warning_that_names_all_keys_without_effect(file: Path) -> None:
    file.write_text(default_file())
    (warning,) = load(file).warnings
    named = [key for key in WITHOUT_EFFECT if f"{key[-1]} (line " in warning]
    assert named == [key for key in WITHOUT_EFFECT if key not in OTHERS]


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT), ids=".".join)
def test_a_key_without_effect_has_none(file: Path, key: tuple[str, ...]) -> None:
    value = {bool: "true", int: "7", str: "'anything'"}[WITHOUT_EFFECT[key].type]
    file.write_text(f"{'.'.join(key)} = {value}")
    loaded = load(file)
    assert loaded.config == Config()
    assert len(loaded.warnings) == 1
    assert f"{key[-1]} (line 1)" in loaded.warnings[0]


def test_a_dump_holds_no_key_without_effect() -> None:
    written = {line.split(" = ")[0] for line in dump(Config()).splitlines()}
    without = {*WITHOUT_EFFECT, *RENAMED}
    dropped = {key[-1] for key in without} - {key[-1] for key in all_keys() if key not in without}
    assert not written & dropped
