"""What the units in systemd/ promise."""

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from snapshotter.daemon.config import DEFAULT_ADDRESS

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "systemd"
DAEMON = "soci-snapshotter-grpc.service"
HOLDER = "soci-snapshotter-holder.service"
SOCKET = "soci-snapshotter-grpc.socket"
TMPFILES = "soci-snapshotter.tmpfiles"
PROGRAM = "/usr/local/bin/soci-snapshotter-grpc"
DAEMON_MODULE = "snapshotter.daemon.main"

# Settings of which any value but "no" gives the service a mount namespace (systemd.exec(5)).
NAMESPACING = {
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "IPCNamespacePath",
    "InaccessiblePaths",
    "LogNamespace",
    "MountAPIVFS",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateNetwork",
    "PrivateTmp",
    "PrivateUsers",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "RootImage",
    "TemporaryFileSystem",
}

# Settings that close /dev/fuse or the making of device nodes.
DEVICES = {"DeviceAllow", "DevicePolicy", "ProtectClock"}


def unit(name: str) -> configparser.ConfigParser:
    """Return a unit; none of ours sets a key twice, which this parser would refuse."""
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name, encoding="utf-8")
    return parser


@pytest.fixture
def daemon() -> configparser.ConfigParser:
    return unit(DAEMON)


@pytest.fixture
def holder() -> configparser.ConfigParser:
    return unit(HOLDER)


both = pytest.mark.parametrize("name", [DAEMON, HOLDER])


def test_there_are_no_others() -> None:
    assert sorted(path.name for path in UNITS.iterdir()) == sorted([DAEMON, HOLDER, SOCKET, TMPFILES])


@both
def test_it_is_always_restarted_at_once_and_for_ever(name: str) -> None:
    assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit(name)["Service"]["Restart"] == "always"
    assert unit(name)["Service"]["RestartSec"] == "100ms"


@both
def test_it_says_when_it_is_ready(name: str) -> None:
    assert unit(name)["Service"]["Type"] == "notify"
    assert unit(name)["Service"]["NotifyAccess"] == "main"


@both
def test_mounts_reach_the_host(name: str) -> None:
    assert not NAMESPACING & unit(name)["Service"].keys()


@both
def test_fuse_and_device_nodes_stay_open(name: str) -> None:
    assert not DEVICES & unit(name)["Service"].keys()


@both
def test_nothing_gains_privileges(name: str) -> None:
    assert unit(name)["Service"]["NoNewPrivileges"] == "yes"


def test_the_socket_is_the_one_that_containerd_knows(daemon: configparser.ConfigParser) -> None:
    socket = unit(SOCKET)["Socket"]
    assert socket["ListenStream"] == DEFAULT_ADDRESS
    assert (socket["SocketMode"], socket["DirectoryMode"]) == ("0660", "0700")
    assert unit(SOCKET)["Install"]["WantedBy"] == "sockets.target"
    assert daemon["Install"]["Also"] == SOCKET


def test_the_directory_of_the_socket_survives_a_stop(daemon: configparser.ConfigParser) -> None:
    assert "RuntimeDirectory" not in daemon["Service"]
    assert f"d {Path(DEFAULT_ADDRESS).parent} 0700 root root -" in (UNITS / TMPFILES).read_text().splitlines()


def test_a_daemon_that_hangs_is_ended_with_a_trace(daemon: configparser.ConfigParser) -> None:
    assert daemon["Service"]["WatchdogSec"] == "30s"
    assert (
        "WatchdogSignal" not in daemon["Service"]
    )  # SIGABRT, on which Python's faulthandler prints all stacks


@both
def test_systemd_never_walks_the_root(name: str) -> None:
    assert not {"StateDirectory", "CacheDirectory"} & unit(name)["Service"].keys()


@both
def test_every_setting_of_the_service_has_its_reason(name: str) -> None:
    """A comment stands before each setting, or before the paragraph of settings that it belongs to."""
    section = (UNITS / name).read_text().partition("[Service]\n")[2].partition("[Install]")[0]
    for paragraph in section.strip().split("\n\n"):
        assert paragraph.startswith("#"), paragraph


def test_the_daemon_is_there_before_containerd(daemon: configparser.ConfigParser) -> None:
    assert daemon["Unit"]["Before"] == "containerd.service"
    assert daemon["Install"]["WantedBy"] == "multi-user.target"


def test_the_daemon_waits_for_no_network(daemon: configparser.ConfigParser) -> None:
    assert "network-online.target" not in daemon["Unit"]["After"]


def test_the_holder_is_started_with_the_daemon_and_never_stopped_with_it(
    daemon: configparser.ConfigParser, holder: configparser.ConfigParser
) -> None:
    assert daemon["Unit"]["Wants"] == HOLDER
    assert {HOLDER, SOCKET} <= set(daemon["Unit"]["After"].split())
    assert holder["Unit"]["Before"] == DAEMON
    binding = {
        "Requires",
        "Requisite",
        "BindsTo",
        "PartOf",
        "StopWhenUnneeded",
        "Conflicts",
        "PropagatesStopTo",
    }
    assert daemon["Unit"]["Requires"] == SOCKET
    assert not (binding - {"Requires"}) & (daemon["Unit"].keys() | holder["Unit"].keys())


def test_the_holder_may_store_descriptors_of_thousands_of_mounts(holder: configparser.ConfigParser) -> None:
    stored = int(holder["Service"]["FileDescriptorStoreMax"])
    assert stored == 4096
    assert int(holder["Service"]["LimitNOFILE"]) > stored


def test_no_process_outlives_its_service(
    daemon: configparser.ConfigParser, holder: configparser.ConfigParser
) -> None:
    assert daemon["Service"]["KillMode"] == "mixed"
    assert holder["Service"]["KillMode"] == "control-group"


def test_the_daemon_keeps_the_capabilities_it_works_with(daemon: configparser.ConfigParser) -> None:
    kept = set(daemon["Service"]["CapabilityBoundingSet"].split())
    assert {"CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_MKNOD", "CAP_SETFCAP", "CAP_SETUID", "CAP_KILL"} <= kept
    assert not {"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_BOOT", "CAP_SYS_TIME", "CAP_SYS_PTRACE"} & kept


def test_the_holder_keeps_none(holder: configparser.ConfigParser) -> None:
    assert holder["Service"]["CapabilityBoundingSet"] == ""
    assert holder["Service"]["RestrictAddressFamilies"] == "AF_UNIX"


@both
def test_it_runs_the_console_script_that_the_package_installs(name: str) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    program, *arguments = unit(name)["Service"]["ExecStart"].split()
    assert program == PROGRAM
    assert scripts[Path(program).name] == f"{DAEMON_MODULE}:main"
    assert arguments == (["holder"] if name == HOLDER else ["--address", "fd://"])


if importlib.util.find_spec(DAEMON_MODULE):  # composed after everything else

    @both
    def test_the_command_line_is_one_that_the_daemon_takes(name: str) -> None:
        _, *arguments = unit(name)["Service"]["ExecStart"].split()
        command = [sys.executable, "-m", DAEMON_MODULE, *arguments, "--help"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)


if shutil.which("systemd-analyze"):  # the tests above hold without it, too

    @pytest.fixture
    def installed(tmp_path: Path) -> Path:
        """The units as they would be installed, with a program that exists."""
        for name in (DAEMON, HOLDER, SOCKET):
            (tmp_path / name).write_text((UNITS / name).read_text().replace(PROGRAM, "/bin/true"))
        return tmp_path

    def test_systemd_understands_every_line(installed: Path) -> None:
        command = [
            "systemd-analyze",
            "verify",
            "--man=no",
            *(f"{installed}/{name}" for name in (DAEMON, HOLDER, SOCKET)),
        ]
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert result.stdout + result.stderr == ""

    @pytest.mark.parametrize(("name", "most"), [(DAEMON, 6.5), (HOLDER, 4.0)])
    def test_exposure_does_not_grow(installed: Path, name: str, most: float) -> None:
        command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"{installed}/{name}"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        level = re.search(r"Overall exposure level for .*: ([\d.]+)", result.stdout)
        assert level
        assert float(level[1]) <= most
