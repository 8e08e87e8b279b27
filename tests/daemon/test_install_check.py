"""What install-check makes of facts, and the whole command on this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.daemon.config import Settings
from snapshotter.daemon.install import host, reference, runtime
from snapshotter.daemon.install.command import configuration
from snapshotter.daemon.install.finding import Finding, Level, as_json, is_good, ok, problem, render, warning

ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
ROOT = "/var/lib/soci-snapshotter-grpc"
BOTH = "nodev\tsysfs\nnodev\toverlay\n\text4\n\tfuseblk\nnodev\tfuse\n"


def levels(findings: list[Finding]) -> dict[str, str]:
    return {each.check: str(each.level) for each in findings}


class TestReport:
    def test_only_problems_make_it_bad(self) -> None:
        good = [ok("a", "fine"), warning("b", "so so", "do that")]
        assert is_good(good)
        assert not is_good([*good, problem("c", "bad", "do this")])

    def test_for_people(self) -> None:
        lines = render([ok("a", "fine"), problem("b", "bad", "do this")]).splitlines()
        assert [line.split() for line in lines] == [
            ["OK", "a", "fine"],
            ["PROBLEM", "b", "bad"],
            ["->", "do", "this"],
        ]

    def test_for_programs(self) -> None:
        assert as_json([problem("b", "bad", "do this")]) == {
            "ok": False,
            "findings": [{"check": "b", "level": "problem", "text": "bad", "mend": "do this"}],
        }


class TestHost:
    @pytest.mark.parametrize(
        ("release", "filesystems", "level"),
        [
            ("6.9.0", BOTH, Level.OK),
            ("10.0-rc1", BOTH, Level.OK),
            ("6.8.12-generic", BOTH, Level.OK),
            ("6.1.0-44-amd64", BOTH, Level.OK),
            ("5.15.0-100-generic", BOTH, Level.WARNING),
            ("6.12.1", BOTH.replace("\tfuse\n", "\n"), Level.PROBLEM),
            ("6.12.1", BOTH.replace("overlay", "other"), Level.PROBLEM),
        ],
    )
    def test_kernel(self, release: str, filesystems: str, level: Level) -> None:
        assert host.kernel(release, filesystems).level is level

    def test_device(self, tmp_path: Path) -> None:
        assert host.device(Path("/dev/null")).level is Level.OK
        assert "No such file" in host.device(tmp_path / "fuse").text

    def test_limits(self) -> None:
        assert host.files(1 << 20, is_daemon=True) == ok("open files", "the daemon's limit is 1048576")
        assert host.files(1024, is_daemon=False).level is Level.WARNING
        assert host.cgroup({}, is_daemon=True).level is Level.OK
        assert "pids.max 100" in host.cgroup({"pids.max": "100"}, is_daemon=True).text

    def test_disk_of_a_root_that_is_not_there_yet(self, tmp_path: Path) -> None:
        assert host.disk(tmp_path / "a/b").level in {Level.OK, Level.WARNING}
        assert host.disk(Path("/proc")).level is not Level.OK

    def test_units(self) -> None:
        well = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
        cases = {
            "ok": well,
            "warning": well | {"UnitFileState": "disabled"},
            "problem": well | {"ActiveState": "failed"},
        }
        for level, unit in cases.items():
            assert levels(list(host.units({host.DAEMON: unit}))) == {host.DAEMON: level}
        assert levels(list(host.units({host.HOLDER: {"LoadState": "not-found"}}))) == {host.HOLDER: "problem"}

    def test_daemon(self) -> None:
        assert host.daemon(None).level is Level.PROBLEM
        assert host.daemon({"lazy": True, "mounts": [1, 2]}).text.endswith("2 lazy mounts")
        not_lazy = {"lazy": False, "not_lazy_because": "no fuse", "mounts": []}
        assert host.daemon(not_lazy).text == "nothing is lazy: no fuse"


class TestContainerd:
    @pytest.mark.parametrize(
        ("text", "level"),
        [
            (None, Level.PROBLEM),
            ("containerd github.com/containerd/containerd 1.3.9 abc", Level.PROBLEM),
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1", Level.WARNING),
            ("containerd github.com/containerd/containerd/v2 v2.1.4 abc", Level.OK),
        ],
    )
    def test_version(self, text: str | None, level: Level) -> None:
        assert runtime.version(text).level is level

    def test_the_plugin_is_found_by_its_address(self) -> None:
        entry = {"type": "snapshot", "address": f"unix://{ADDRESS}", "exports": {"root": ROOT + "/"}}
        name, found = runtime.plugin(
            {"proxy_plugins": {"other": {"address": "/x"}, "lazy": entry}}, ADDRESS, ROOT
        )
        assert (name, levels(found)) == ("lazy", {"proxy plugin": "ok"})

    @pytest.mark.parametrize(
        ("entry", "name", "level"),
        [
            ({"type": "content", "address": ADDRESS}, "", "problem"),
            ({"type": "snapshot", "address": "/elsewhere.sock"}, "", "problem"),
            ({"type": "snapshot", "address": ADDRESS}, "soci", "ok"),
            ({"type": "snapshot", "address": ADDRESS, "exports": {"root": "/other"}}, "soci", "warning"),
        ],
    )
    def test_what_a_plugin_says(self, entry: dict[str, object], name: str, level: str) -> None:
        found_name, found = runtime.plugin({"proxy_plugins": {"soci": entry}}, ADDRESS, ROOT)
        assert (found_name, levels(found)) == (name, {"proxy plugin": level})

    @pytest.mark.parametrize(
        ("plugins", "expected"),
        [
            ({}, {}),
            (
                {"io.containerd.grpc.v1.cri": {"containerd": {"snapshotter": "overlayfs"}}},
                {"CRI annotations": "warning", "CRI snapshotter": "warning"},
            ),
            (
                {
                    "io.containerd.cri.v1.images": {
                        "snapshotter": "soci",
                        "disable_snapshot_annotations": False,
                    }
                },
                {"CRI annotations": "ok", "CRI snapshotter": "ok"},
            ),
        ],
    )
    def test_cri(self, plugins: dict[str, object], expected: dict[str, str]) -> None:
        assert levels(list(runtime.cri({"plugins": plugins}, "soci"))) == expected
        disabled = {"plugins": plugins, "disabled_plugins": list(plugins)}
        assert list(runtime.cri(disabled, "soci")) == []

    def test_whether_it_has_loaded_the_plugin(self) -> None:
        line = "io.containerd.snapshotter.v1    soci    -    {}\n"
        assert runtime.loaded(line.format("ok"), "soci").level is Level.OK
        assert runtime.loaded(line.format("error"), "soci").level is Level.PROBLEM
        assert (
            runtime.loaded("io.containerd.snapshotter.v1 native linux/amd64 ok\n", "soci").level
            is Level.PROBLEM
        )
        assert runtime.loaded(None, "soci").level is Level.PROBLEM


class TestReference:
    def test_its_program(self, tmp_path: Path) -> None:
        script, binary = tmp_path / "script", tmp_path / "binary"
        script.write_text("#!/bin/sh\n")
        binary.write_bytes(b"\x7fELF\2\1\1")
        assert list(reference.program(str(script))) == list(reference.program(None)) == []
        assert levels(list(reference.program(str(binary)))) == {"reference program": "warning"}

    def test_its_process(self, tmp_path: Path) -> None:
        for pid, program in (("10", "/usr/bin/python3.11"), ("11", "/usr/local/bin/soci-snapshotter-grpc")):
            (tmp_path / pid).mkdir()
            (tmp_path / pid / "exe").symlink_to(program)
        (tmp_path / "version").write_text("")
        assert [each.text for each in reference.processes(tmp_path)] == [
            "process 11 is the reference's daemon"
        ]

    def test_its_mounts(self) -> None:
        line = "36 25 0:44 / {}/snapshotter/snapshots/1/fs rw - {} soci rw\n"
        text = line.format(ROOT, "fuse.rawBridge") + line.format("/other", "fuse.rawBridge")
        assert [each.text for each in reference.mounts(text, Path(ROOT))] == [f"1 below {ROOT}"]
        assert list(reference.mounts(line.format(ROOT, "fuse.soci"), Path(ROOT))) == []

    def test_its_state(self, tmp_path: Path) -> None:
        assert list(reference.state(tmp_path)) == []
        (tmp_path / "snapshotter").mkdir()
        (tmp_path / "snapshotter/metadata.db").write_bytes(b"bolt")
        assert levels(list(reference.state(tmp_path))) == {"reference state": "problem"}


def test_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("log_level = 5\n")
    found = configuration(Settings.from_args(["--config", str(config)], {}))
    assert found.level is Level.PROBLEM
    assert "config.toml:1" in found.text


def test_the_command_on_this_host(root: None, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "snapshotter.daemon.main",
        "--root",
        str(tmp_path / "none"),
        "install-check",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    found = {each["check"]: each["level"] for each in report["findings"]}
    assert found["fuse device"] == "ok"
    assert found["daemon"] == "problem"
