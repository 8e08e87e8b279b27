"""Command line, environment, addresses, and the config subcommand."""

import tomllib
from pathlib import Path

import pytest

from snapshotter import __version__
from snapshotter.daemon.config import (
    DEFAULT_ADDRESS,
    DEFAULT_PATH,
    DEFAULT_ROOT,
    EXIT_CONFIG,
    Address,
    Config,
    Settings,
    build_parser,
    default_text,
    dump,
    loading,
    parse_address,
    run_config_command,
)
from snapshotter.errors import ConfigError, UsageError


class TestAddress:
    """Where the daemon listens."""

    @pytest.mark.parametrize("text", ["/run/x.sock", "unix:///run/x.sock"])
    def test_a_path(self, text: str) -> None:
        address = parse_address(text)
        assert address == Address(Path("/run/x.sock"))
        assert not address.is_inherited
        assert str(address) == "unix:///run/x.sock"

    def test_a_socket_of_systemd(self) -> None:
        assert parse_address("fd://").is_inherited
        assert str(parse_address("fd://")) == "fd://"

    @pytest.mark.parametrize(
        "text", ["", "x.sock", "unix://x.sock", "unix:x", "tcp://127.0.0.1:1", "fd://3", "/run/", "/a\0b"]
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^SOME_VARIABLE: must be an absolute path"):
            parse_address(text, "SOME_VARIABLE")

    def test_a_path_that_the_kernel_would_cut(self) -> None:
        assert parse_address("/" + "x" * 106).path
        with pytest.raises(ConfigError, match="at most 107 bytes"):
            parse_address("/" + "x" * 105 + "\u00e4")


class TestSettings:
    """Flags before variables before defaults."""

    def test_defaults(self) -> None:
        settings = Settings.from_args([], {})
        assert settings.address == Address(Path(DEFAULT_ADDRESS))
        assert settings.root == DEFAULT_ROOT
        assert settings.config_path == DEFAULT_PATH
        assert not settings.is_config_explicit
        assert settings.log_level is None

    def test_variables(self, tmp_path: Path) -> None:
        environ = {
            "SOCI_SNAPSHOTTER_ADDRESS": "fd://",
            "SOCI_SNAPSHOTTER_CONFIG": f"{tmp_path}/c.toml",
            "SOCI_SNAPSHOTTER_LOG_LEVEL": "debug",
            "SOCI_SNAPSHOTTER_ROOT": f"{tmp_path}/root/",
        }
        settings = Settings.from_args([], environ)
        assert settings.address.is_inherited
        assert settings.config_path == tmp_path / "c.toml"
        assert settings.is_config_explicit
        assert settings.log_level == "debug"
        assert settings.root == tmp_path / "root"

    def test_flags_win(self) -> None:
        environ = {"SOCI_SNAPSHOTTER_ADDRESS": "nonsense", "SOCI_SNAPSHOTTER_ROOT": "/env"}
        settings = Settings.from_args(
            ["--address", "/flag.sock", "--root=/flag", "--log-level", "warn"], environ
        )
        assert settings.address == Address(Path("/flag.sock"))
        assert settings.root == Path("/flag")
        assert settings.log_level == "warn"

    def test_an_empty_variable_is_none(self) -> None:
        environ = {"SOCI_SNAPSHOTTER_CONFIG": "", "SOCI_SNAPSHOTTER_LOG_LEVEL": ""}
        assert Settings.from_args([], environ).config_path == DEFAULT_PATH

    def test_naming_the_default_file_does_not_make_it_required(self) -> None:
        assert not Settings.from_args(["--config", str(DEFAULT_PATH)], {}).is_config_explicit

    @pytest.mark.parametrize(
        ("argv", "environ", "message"),
        [
            ([], {"SOCI_SNAPSHOTTER_ADDRESS": "x"}, "SOCI_SNAPSHOTTER_ADDRESS: must be an absolute path"),
            (["--address", ""], {}, "--address: must be an absolute path"),
            (["--root", "var"], {}, "--root: must be an absolute path, got 'var'"),
            ([], {"SOCI_SNAPSHOTTER_ROOT": "."}, "SOCI_SNAPSHOTTER_ROOT: must be an absolute path"),
            (["--log-level", "loud"], {}, "--log-level: must be one of trace, debug"),
        ],
    )
    def test_mistakes_name_where_they_stand(
        self, argv: list[str], environ: dict[str, str], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"^{message}"):
            Settings.from_args(argv, environ)

    def test_a_named_file_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file"):
            Settings.from_args(["--config", f"{tmp_path}/absent.toml"], {}).load()

    def test_load_reads_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("no_prometheus = true")
        assert Settings.from_args(["--config", str(file)], {}).load().config.no_prometheus

    def test_subcommands_are_the_callers(self) -> None:
        parser = build_parser()
        commands = parser.add_subparsers(dest="command")
        commands.add_parser("status").add_argument("--json", action="store_true")
        settings = Settings.from_args(["--root", "/r", "status", "--json"], {}, parser)
        assert (settings.root, settings.namespace.command, settings.namespace.json) == (
            Path("/r"),
            "status",
            True,
        )
        assert Settings.from_args([], {}, parser).namespace.command is None

    def test_unknown_and_abbreviated_flags_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            Settings.from_args(["--addr", "/x"], {})
        assert "unrecognized arguments: --addr" in capsys.readouterr().err

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            Settings.from_args(["--version"], {})
        assert capsys.readouterr().out == f"soci-snapshotter-grpc {__version__}\n"


class TestConfigCommand:
    """`config default|dump|check`."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "config.toml"

    def test_default(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_config_command("default", file) == 0
        assert capsys.readouterr().out == default_text()

    def test_dump_is_what_the_file_comes_to(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text("[fuse]\nread_ahead_kb = 4\nattr_timeout = 1")
        assert run_config_command("dump", file) == 0
        output = capsys.readouterr()
        assert tomllib.loads(output.out)["fuse"]["read_ahead_kb"] == 4
        assert "[fuse] attr_timeout (line 3)" in output.err

    def test_dump_without_a_file(
        self, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "DEFAULT_PATH", file)
        assert run_config_command("dump", None) == 0
        assert capsys.readouterr().out == dump(Config())

    def test_dump_of_a_bad_file(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text("x = 1")
        assert run_config_command("dump", file) == EXIT_CONFIG
        output = capsys.readouterr()
        assert (output.out, output.err) == ("", f"{file}:1: x: unknown key\n")

    def test_check_lists_all_mistakes(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text("x = 1\ny = 2")
        assert run_config_command("check", file) == EXIT_CONFIG
        assert capsys.readouterr().out == f"{file}:1: x: unknown key\n{file}:2: y: unknown key\n"

    def test_check_of_a_good_file_says_nothing(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text(default_text())
        assert run_config_command("check", file) == 0
        output = capsys.readouterr()
        assert output.out + output.err == ""

    def test_check_of_no_file(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_config_command("check", file) == EXIT_CONFIG
        assert "no such file" in capsys.readouterr().out

    def test_another_action(self) -> None:
        with pytest.raises(UsageError, match="default, dump, check, got 'show'"):
            run_config_command("show", None)
