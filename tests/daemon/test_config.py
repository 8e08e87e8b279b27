"""A file's values, the defaults behind them, and the way back to text."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.daemon.config import Config, Loaded, Retry, dump, load
from snapshotter.daemon.config.sources import DecompressorConfig, HostConfig, MirrorConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def loaded(file: Path, text: str) -> Loaded:
    file.write_text(text)
    return load(file, explicit=True)


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    assert loaded(file, "# nothing\n") == Loaded(Config(), ())


def test_the_defaults_that_others_rely_on() -> None:
    config = Config()
    assert config.fuse.idle_timeout_sec == 60.0
    assert config.fuse.read_ahead_kb == 512
    assert config.fuse.read_budget_sec == 60.0
    assert config.cache.max_bytes == 0
    assert config.fetch.inflight_max_bytes == 64 << 20
    assert config.fetch.background
    assert config.fetch.max_background_bytes_per_sec == 0
    assert config.pull_modes.soci_v1.enable
    assert config.pull_modes.soci_v2.enable
    assert config.metrics_address == ""


def test_values_land_where_they_belong(file: Path) -> None:
    config = loaded(
        file,
        """
        log_level = "debug"
        fuse.idle_timeout_sec = 5
        cache = { max_bytes = 10_000_000_000, min_free_bytes = 0x1000 }
        [http]
        DialTimeoutMsec = 1500
        [pull_modes.soci_v1]
        enable = false
        """,
    ).config
    assert config.log_level == "debug"
    assert config.fuse.idle_timeout_sec == 5.0
    assert isinstance(config.fuse.idle_timeout_sec, float)
    assert (config.cache.max_bytes, config.cache.min_free_bytes) == (10**10, 4096)
    assert config.http.dial_timeout == 1.5
    assert not config.pull_modes.soci_v1.enable
    assert config.pull_modes.soci_v2.enable


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().fuse.read_ahead_kb = 4  # type: ignore[misc]


class TestZero:
    """The reference's "0 means default", for its keys; ours mean what they say."""

    def test_zero_and_nothing_are_the_default(self, file: Path) -> None:
        text = """
        log_level = ""
        metrics_network = ""
        mount_timeout_sec = 0
        max_concurrency = 0
        [http]
        DialTimeoutMsec = 0
        ResponseHeaderTimeoutMsec = 0
        RequestTimeoutMsec = 0
        MaxRetries = 0
        MinWaitMsec = 0
        MaxWaitMsec = 0
        [blob]
        fetching_timeout_sec = 0
        [content_store]
        containerd_address = ""
        [cri_keychain]
        image_service_path = ""
        """
        assert loaded(file, text) == Loaded(Config(), ())

    def test_below_zero_is_not_the_default(self, file: Path) -> None:
        config = loaded(file, "max_concurrency = -1\n[http]\nMaxRetries = -1").config
        assert config.max_concurrency == -1
        assert config.http.retry.attempts == 1
        assert config.blob_retry.attempts == 1

    def test_zero_of_our_keys_is_zero(self, file: Path) -> None:
        config = loaded(file, "[cache]\nmin_free_bytes = 0\n[fuse]\nread_ahead_kb = 0").config
        assert config.cache.min_free_bytes == 0
        assert config.fuse.read_ahead_kb == 0


class TestRetries:
    """Attempts and waits, in seconds, of requests and of ranges."""

    def test_defaults(self) -> None:
        assert (
            Config().http.retry == Config().blob_retry == Retry(attempts=9, first_wait=0.03, max_wait=300.0)
        )

    def test_ranges_follow_http_where_blob_says_nothing(self, file: Path) -> None:
        config = loaded(file, "[http]\nMaxRetries = 2\nMinWaitMsec = 10\n[blob]\nmax_wait_msec = 500").config
        assert config.blob_retry == Retry(attempts=3, first_wait=0.01, max_wait=0.5)
        assert config.http.retry == Retry(attempts=3, first_wait=0.01, max_wait=300.0)

    def test_blob_wins_for_ranges(self, file: Path) -> None:
        config = loaded(file, "[blob]\nmax_retries = -1\nmin_wait_msec = 1000").config
        assert config.blob_retry == Retry(attempts=1, first_wait=1.0, max_wait=300.0)
        assert config.http.retry.attempts == 9

    @pytest.mark.parametrize(("written", "meant"), [(0, 2), (1, 1), (-1, 3)])
    def test_fetches_after_a_wrong_digest(self, file: Path, written: int, meant: int) -> None:
        config = loaded(file, f"[blob]\nmax_span_verification_retries = {written}").config
        assert config.blob.span_refetches == meant


class TestBackground:
    """One switch under two names."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("[background_fetch]\ndisable = true", False),
            ("[background_fetch]\ndisable = false", True),
            ("[fetch]\nbackground = false", False),
            ("[fetch]\nbackground = false\n[background_fetch]\ndisable = false", False),
            ("[fetch]\nbackground = false\n[background_fetch]\ndisable = true", False),
            ("[fetch]\nbackground = true\n[background_fetch]\ndisable = false", True),
        ],
    )
    def test_either_turns_it_off(self, file: Path, text: str, expected: bool) -> None:
        assert loaded(file, text).config.fetch.background is expected


def test_mirrors_and_decompressors(file: Path) -> None:
    text = """
    [[resolver.host."registry.example:5000".mirrors]]
    host = "http://near.example:5000"
    insecure = true
    [[resolver.host."registry.example:5000".mirrors]]
    host = "far.example"
    request_timeout_sec = -1
    [pull_modes.parallel_pull_unpack]
    concurrent_download_chunk_size = "1.5 MB"
    [pull_modes.parallel_pull_unpack.decompress_streams.gzip]
    path = "/usr/bin/unpigz"
    args = ["-c"]
    """
    config = loaded(file, text).config
    near = MirrorConfig(host="http://near.example:5000", insecure=True)
    far = MirrorConfig(host="far.example", request_timeout_sec=-1)
    assert config.resolver.host == {"registry.example:5000": HostConfig((near, far))}
    parallel = config.pull_modes.parallel_pull_unpack
    assert parallel.decompress_streams == {"gzip": DecompressorConfig("/usr/bin/unpigz", ("-c",))}
    assert parallel.download_chunk_bytes == 3 << 19


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("0", 0), ("8mb", 8 << 20), ("16 KB", 1 << 14), ("2gb", 2 << 30), ("77b", 77)],
)
def test_sizes_of_the_reference(file: Path, text: str, expected: int) -> None:
    written = f'[pull_modes.parallel_pull_unpack]\nconcurrent_download_chunk_size = "{text}"'
    assert loaded(file, written).config.pull_modes.parallel_pull_unpack.download_chunk_bytes == expected


@pytest.mark.parametrize(
    ("network", "address"),
    [
        ("tcp", "127.0.0.1:9100"),
        ("tcp", ":9100"),
        ("tcp", "[::1]:9100"),
        ("tcp", "node:0"),
        ("unix", "/run/m.sock"),
    ],
)
def test_addresses_of_metrics(file: Path, network: str, address: str) -> None:
    config = loaded(file, f'metrics_network = "{network}"\nmetrics_address = "{address}"').config
    assert config.metrics_address == address


def test_unix_prefix_of_a_socket_is_taken_off(file: Path) -> None:
    config = loaded(file, '[content_store]\ncontainerd_address = "unix:///run/c.sock"').config
    assert config.content_store.containerd_address == "/run/c.sock"


class TestWarnings:
    """One sentence for each kind of thing that an operator should know."""

    def test_all_keys_without_effect_are_in_one_warning(self, file: Path) -> None:
        text = "resolve_result_entry = 30\n[fuse]\nattr_timeout = 1\nread_ahead_kb = 64\n[blob]\nvalid_interval = 60\n"
        result = loaded(file, text)
        assert result.config.fuse.read_ahead_kb == 64
        (warning,) = result.warnings
        assert warning == (
            f"{file}: accepted, but without effect in this snapshotter: resolve_result_entry (line 1), "
            "[fuse] attr_timeout (line 3), [blob] valid_interval (line 6)"
        )

    def test_a_file_of_values_with_meaning_has_none(self, file: Path) -> None:
        assert loaded(file, dump(Config())).warnings == ()


class TestDump:
    """Text that loads as what was dumped."""

    def test_is_stable_and_complete(self, file: Path) -> None:
        text = dump(Config())
        assert loaded(file, text).config == Config()
        assert dump(loaded(file, text).config) == text
        assert text.startswith('log_level = "info"\n')

    def test_nested_tables_and_awkward_texts_survive(self, file: Path) -> None:
        mirrors = (MirrorConfig('http://q"uote\\.example'), MirrorConfig("\u00e4.example", insecure=True))
        hosts = {"registry.example": HostConfig(mirrors), 'a b"c': HostConfig(())}
        resolver = dataclasses.replace(Config().resolver, host=hosts)
        streams = {"zstd": DecompressorConfig("/bin/un zstd", ("-d", "\x7f\n\t"))}
        parallel = dataclasses.replace(Config().pull_modes.parallel_pull_unpack, decompress_streams=streams)
        modes = dataclasses.replace(Config().pull_modes, parallel_pull_unpack=parallel)
        config = dataclasses.replace(Config(), resolver=resolver, pull_modes=modes)
        found = loaded(file, dump(config)).config
        assert found.pull_modes == modes
        assert found.resolver.host["registry.example"] == HostConfig(mirrors)

    @given(
        idle=st.floats(min_value=0.1, max_value=1e18),
        max_bytes=st.integers(min_value=0, max_value=2**63 - 1),
        path=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    )
    def test_any_value_survives(self, idle: float, max_bytes: int, path: str) -> None:
        fuse = dataclasses.replace(Config().fuse, idle_timeout_sec=idle)
        cache = dataclasses.replace(Config().cache, max_bytes=max_bytes)
        store = dataclasses.replace(Config().content_store, containerd_address=f"/{path}")
        data = tomllib.loads(dump(dataclasses.replace(Config(), fuse=fuse, cache=cache, content_store=store)))
        assert data["fuse"]["idle_timeout_sec"] == idle
        assert data["cache"]["max_bytes"] == max_bytes
        assert data["content_store"]["containerd_address"] == f"/{path}"
