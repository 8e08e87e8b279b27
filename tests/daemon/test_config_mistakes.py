"""Every way to get the configuration wrong: what is said, and where."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.daemon.config import check, load
from snapshotter.errors import ConfigError

TYPES = {
    '[blob]\nmax_retries = "x"': "2: [blob] max_retries: must be an integer >= -1, got 'x'",
    "[blob]\nmax_retries = 1.5": "2: [blob] max_retries: must be an integer >= -1, got 1.5",
    "[http]\n\nMaxRetries = true": "3: [http] MaxRetries: must be an integer >= -1, got true",
    "no_prometheus = 1": "1: no_prometheus: must be true or false, got 1",
    'no_prometheus = "yes"': "1: no_prometheus: must be true or false, got 'yes'",
    "metrics_address = 9100": '1: metrics_address: must be "host:port" or an absolute path, got 9100',
    "[fuse]\nidle_timeout_sec = false": "2: [fuse] idle_timeout_sec: must be a number >= 0.1 (seconds), got false",
    "[fuse]\nidle_timeout_sec = [1]": "2: [fuse] idle_timeout_sec: must be a number >= 0.1 (seconds), got an array",
    "[cache]\nmax_bytes = {}": "2: [cache] max_bytes: must be an integer >= 0 (bytes), got a table",
    "log_level = 2026-01-02": "1: log_level: must be one of "
    '"trace", "debug", "info", "warn", "warning", "error", "fatal", "panic", got 2026-01-02',
    "blob = 3": "1: [blob]: must be a table, got 3",
    "[[fuse]]": "1: [fuse]: must be a table, got an array",
    "fetch = 1\n[background_fetch]\ndisable = true": "1: [fetch]: must be a table, got 1",
    "background_fetch = 0.5": "1: [background_fetch]: must be a table, got 0.5",
    "[background_fetch]\ndisable = 1": "2: [background_fetch] disable: must be true or false, got 1",
    "[resolver]\nhost = 'mirror'": "2: [resolver.host]: must be a table, got 'mirror'",
    '[resolver.host."r.example"]\nmirrors = "m"': '2: [resolver.host."r.example"] mirrors: '
    "must be an array of tables, got 'm'",
    '[resolver.host."r.example"]\nmirrors = ["m"]': '2: [resolver.host."r.example".mirrors]: '
    "must be a table, got 'm'",
    "[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = '/bin/x'\nargs = '-d'": "3: "
    "[pull_modes.parallel_pull_unpack.decompress_streams.gzip] args: must be an array of texts, got '-d'",
    "[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = '/bin/x'\nargs = [1]": "3: "
    "[pull_modes.parallel_pull_unpack.decompress_streams.gzip] args: must be an array of texts, got an array",
    "[directory_cache]\ndirect = 'yes'": "2: [directory_cache] direct: must be true or false, got 'yes'",
    "resolve_result_entry = 1.0": "1: resolve_result_entry: must be an integer, got 1.0",
    "http_cache_type = 1": "1: http_cache_type: must be a text, got 1",
}

RANGES = {
    "[blob]\nmax_retries = -2": "2: [blob] max_retries: must be an integer >= -1, got -2",
    "[http]\nDialTimeoutMsec = -1": "2: [http] DialTimeoutMsec: must be an integer >= 0 (milliseconds), got -1",
    "mount_timeout_sec = -30": "1: mount_timeout_sec: must be an integer >= 0 (seconds), got -30",
    "[fuse]\nidle_timeout_sec = 0": "2: [fuse] idle_timeout_sec: must be a number >= 0.1 (seconds), got 0",
    "[fuse]\nidle_timeout_sec = nan": "2: [fuse] idle_timeout_sec: must be a number >= 0.1 (seconds), got nan",
    "[fuse]\nidle_timeout_sec = inf": "2: [fuse] idle_timeout_sec: must be a number >= 0.1 (seconds), got inf",
    "[fuse]\nread_ahead_kb = 65537": "2: [fuse] read_ahead_kb: must be an integer from 0 to 65536 (KiB), got 65537",
    "[fetch]\nondemand_connections = 0": "2: [fetch] ondemand_connections: "
    "must be an integer from 1 to 256, got 0",
    "[fetch]\ninflight_max_bytes = 1024": "2: [fetch] inflight_max_bytes: "
    "must be an integer >= 1048576 (bytes), got 1024",
    "[layer]\ncompile_timeout_sec = 0.5": "2: [layer] compile_timeout_sec: "
    "must be a number >= 1 (seconds), got 0.5",
    "[cache]\nmax_bytes = 100000000000000000000": "2: [cache] max_bytes: "
    "must be an integer >= 0 (bytes), got 100000000000000000000",
    'log_level = "loud"': "1: log_level: must be one of "
    '"trace", "debug", "info", "warn", "warning", "error", "fatal", "panic", got \'loud\'',
    'log_format = "xml"': '1: log_format: must be one of "auto", "json", "journal", got \'xml\'',
    'metrics_network = "udp"': '1: metrics_network: must be one of "tcp", "unix", got \'udp\'',
    "[pull_modes.parallel_pull_unpack]\nmax_concurrent_unpacks = -2": "2: [pull_modes.parallel_pull_unpack] "
    "max_concurrent_unpacks: must be an integer >= -1, got -2",
}

UNITS_AND_FORMS = {
    '[fetch]\ninflight_max_bytes = "64 MiB"': "2: [fetch] inflight_max_bytes: "
    "must be an integer >= 1048576 (bytes), got '64 MiB'; write 67108864",
    '[cache]\nmax_bytes = "1.5g"': "2: [cache] max_bytes: "
    "must be an integer >= 0 (bytes), got '1.5g'; write 1610612736",
    '[fuse]\nidle_timeout_sec = "2m"': "2: [fuse] idle_timeout_sec: "
    "must be a number >= 0.1 (seconds), got '2m'; write 120",
    '[http]\nMaxWaitMsec = "5s"': "2: [http] MaxWaitMsec: "
    "must be an integer >= 0 (milliseconds), got '5s'; write 5000",
    '[pull_modes.parallel_pull_unpack]\nconcurrent_download_chunk_size = "8 pages"': "2: "
    "[pull_modes.parallel_pull_unpack] concurrent_download_chunk_size: "
    "must be a size such as \"8mb\" (b, kb, mb, gb; of 1024), or empty, got '8 pages'",
    '[content_store]\ncontainerd_address = "containerd.sock"': "2: [content_store] containerd_address: "
    "must be an absolute path, with or without unix://, got 'containerd.sock'",
    '[cri_keychain]\nimage_service_path = "tcp://x"': "2: [cri_keychain] image_service_path: "
    "must be an absolute path, with or without unix://, got 'tcp://x'",
    '[kubeconfig_keychain]\nkubeconfig_path = "~/.kube/config"': "2: [kubeconfig_keychain] kubeconfig_path: "
    "must be an absolute path, or empty, got '~/.kube/config'",
    "[pull_modes.parallel_pull_unpack.decompress_streams.zstd]\npath = 'unzstd'": "2: "
    "[pull_modes.parallel_pull_unpack.decompress_streams.zstd] path: must be an absolute path, got 'unzstd'",
    "[pull_modes.parallel_pull_unpack.decompress_streams.lz4]\npath = '/bin/lz4'": "1: "
    '[pull_modes.parallel_pull_unpack.decompress_streams] lz4: compression must be one of "gzip", "zstd"',
    "[pull_modes.parallel_pull_unpack.decompress_streams.zstd]": "1: "
    "[pull_modes.parallel_pull_unpack.decompress_streams.zstd]: path is missing",
    '[[resolver.host."r.example".mirrors]]\nhost = "m"\n[[resolver.host."r.example".mirrors]]\ninsecure = true': "3"
    ': [resolver.host."r.example".mirrors]: host is missing',
    '[[resolver.host."r.example".mirrors]]\nhost = "m"\n[[resolver.host."r.example".mirrors]]\nhost = "a b"': "4"
    ": [resolver.host.\"r.example\".mirrors] (entry 2) host: must be a host name, host:port or URL, got 'a b'",
}

UNKNOWN = {
    "[fuse]\nidle_timeout = 60": "2: [fuse] idle_timeout: unknown key; did you mean [fuse] idle_timeout_sec?",
    "idle_timeout_sec = 60": "1: idle_timeout_sec: unknown key; did you mean [fuse] idle_timeout_sec?",
    "[http]\nmaxretries = 3": "2: [http] maxretries: unknown key; did you mean [http] MaxRetries?",
    "[http]\nmax_retrys = 3": "2: [http] max_retrys: unknown key; did you mean [http] MaxRetries?",
    "[fues]\nread_ahead_kb = 1": "1: [fues]: unknown table; did you mean [fuse]?",
    "[soci_v1]\nenable = true": "1: [soci_v1]: unknown table; did you mean [pull_modes.soci_v1]?",
    "[pull_modes.soci_v3]\nenable = true": "1: [pull_modes.soci_v3]: unknown table; "
    "did you mean [pull_modes.soci_v2]?",
    "[directory_cache]\nmax_fds = 1": "2: [directory_cache] max_fds: unknown key; "
    "did you mean [directory_cache] max_cache_fds?",
    "[background_fetch]\ndisabled = true": "2: [background_fetch] disabled: unknown key; "
    "did you mean [background_fetch] disable?",
    '[resolver.host."r.example"]\nmirror = []': '2: [resolver.host."r.example"] mirror: unknown key; '
    'did you mean [resolver.host."r.example"] mirrors?',
    "a.b = 1": "1: [a]: unknown table",
    "nonsense = 1": "1: nonsense: unknown key",
}

CONFLICTS = {
    "[http]\nMinWaitMsec = 50\nMaxWaitMsec = 40": "3: [http] MaxWaitMsec: must not be below MinWaitMsec (50)",
    "[blob]\nmin_wait_msec = 400\nmax_wait_msec = 300": "3: [blob] max_wait_msec: "
    "must not be below min_wait_msec (400, of [blob] or [http])",
    "[blob]\nmax_wait_msec = 20": "2: [blob] max_wait_msec: "
    "must not be below min_wait_msec (30, of [blob] or [http])",
    "[fetch]\nbackground = true\n[background_fetch]\ndisable = true": "4: [background_fetch] disable: "
    "is true, but so is [fetch] background; leave one of them out",
    'metrics_network = "unix"\nmetrics_address = "127.0.0.1:9100"': "2: metrics_address: "
    "must be an absolute path with metrics_network \"unix\", got '127.0.0.1:9100'",
    'metrics_address = "/run/metrics.sock"': "1: metrics_address: "
    'must be "host:port" with metrics_network "tcp", got \'/run/metrics.sock\'',
    'metrics_address = ":99999"': '1: metrics_address: must be "host:port" with metrics_network "tcp", got \':99999\'',
    'metrics_address = "::1:80"': '1: metrics_address: must be "host:port" with metrics_network "tcp", got \'::1:80\'',
    "[pull_modes.parallel_pull_unpack]\nmax_concurrent_downloads = 2": "2: [pull_modes.parallel_pull_unpack] "
    "max_concurrent_downloads: must be -1 or at least max_concurrent_downloads_per_image (3), got 2",
    "[pull_modes.parallel_pull_unpack]\nmax_concurrent_unpacks = 2\nmax_concurrent_unpacks_per_image = -1": "2: "
    "[pull_modes.parallel_pull_unpack] max_concurrent_unpacks: "
    "must be -1, as max_concurrent_unpacks_per_image is, got 2",
}

NOT_TOML = {
    "[fuse\n": "1: not valid TOML: Expected ']' at the end of a table declaration",
    "log_level = info\n": "1: not valid TOML: Expected newline or end of document after a statement",
    "[fuse]\n[fuse]\n": "2: not valid TOML: Cannot declare ('fuse',) twice",
    "log_level = 'info'\nlog_level = 'warn'": "2: not valid TOML: Cannot overwrite a value",
    "\n\nkey": "3: not valid TOML: Expected '=' after a key in a key/value pair",
}

MISTAKES = TYPES | RANGES | UNITS_AND_FORMS | UNKNOWN | CONFLICTS | NOT_TOML


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_there_are_at_least_forty_mistakes() -> None:
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_file_line_key_and_what_is_allowed(text: str, file: Path) -> None:
    file.write_text(text)
    assert check(file) == [f"{file}:{MISTAKES[text]}"]
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"{file}:{MISTAKES[text]}"


def test_all_mistakes_of_a_file_are_found_at_once_in_its_order(file: Path) -> None:
    file.write_text('x = 1\n[fuse]\nread_ahead_kb = -1\n[blob]\nmax_retries = ""\ncheck_always = 3\n')
    lines = [message.removeprefix(f"{file}:").split(": ")[0] for message in check(file)]
    assert lines == ["1", "3", "5", "6"]


def test_values_in_an_inline_table_are_found_at_its_line(file: Path) -> None:
    file.write_text("\nfuse = { idle_timeout_sec = 0, read_ahead_kb = 1.5 }\n")
    assert [message.split(": ")[0] for message in check(file)] == [f"{file}:2", f"{file}:2"]


def test_a_long_value_is_cut(file: Path) -> None:
    file.write_text(f'log_format = "{"x" * 5000}"')
    assert len(check(file)[0]) < 300


class TestFiles:
    """What is wrong before the first line is read."""

    def test_a_missing_file_means_the_defaults_unless_it_was_named(self, file: Path) -> None:
        assert load(file).warnings == ()
        with pytest.raises(ConfigError, match=f"{file}: no such file; name one that exists"):
            load(file, explicit=True)

    def test_a_directory(self, tmp_path: Path) -> None:
        assert check(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]

    def test_a_fifo_does_not_block(self, file: Path) -> None:
        os.mkfifo(file)
        assert check(file) == [f"{file}: not a regular file"]

    def test_no_permission(self, file: Path) -> None:
        file.write_text("")
        file.chmod(0)
        with ordinary_user():
            assert check(file) == [f"{file}: cannot be read: Permission denied"]

    def test_a_file_that_is_no_configuration_by_its_size(self, file: Path) -> None:
        file.write_bytes(b"#" * (1 << 20) + b"\n")
        assert check(file) == [f"{file}: larger than 1048576 bytes, which no configuration is"]

    def test_not_utf8(self, file: Path) -> None:
        file.write_bytes(b"# \xc3\xa4\n\nlog_level = '\xff'\n")
        assert check(file) == [f"{file}:3: not UTF-8 text"]

    def test_bottomless_nesting(self, file: Path) -> None:
        file.write_text("x = " + "[" * 100_000)
        assert check(file) == [f"{file}: not valid TOML: nested too deeply"]

    def test_a_file_that_anybody_may_write_is_a_warning(self, file: Path) -> None:
        file.write_text("")
        file.chmod(0o666)
        assert load(file).warnings == (
            f"{file}: every user of this host may write it; run: chmod o-w {file}",
        )
        file.chmod(0o664)
        assert load(file).warnings == ()


@given(st.text(alphabet=st.sampled_from(list("[]{}=.,\"'#\n \\ab1-_")) | st.characters(), max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    for message in check(file):
        assert message.startswith(f"{file}:")


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up root for a moment, if we have it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
