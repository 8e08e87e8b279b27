"""The program as a whole: options, environment, how errors and interrupts reach the user."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trio

from snapshotter import __version__
from snapshotter.cli.main import REFERENCE_VERSION, build_parser, main
from snapshotter.containerd.client import Containerd
from snapshotter.errors import NotFound, SnapshotterError, UsageError
from snapshotter.nursery import first_error, open_nursery
from tests.cli.conftest import Soci
from tests.support.containerd import Containerd as Server
from tests.support.images import ImageBuilder, layer
from tests.support.registry import Registry, Stall

PROGRAM = [sys.executable, "-m", "snapshotter.cli.main"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert out == f"soci version v{REFERENCE_VERSION} snapshotter-{__version__}\n"
    found = re.search(r"v?(\d+\.\d+\.\d+)", out)  # as nerdctl looks for it
    assert found is not None
    assert found[1] == REFERENCE_VERSION


def test_the_environment_names_containerd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTAINERD_ADDRESS", raising=False)
    monkeypatch.delenv("CONTAINERD_NAMESPACE", raising=False)
    options = build_parser().parse_args(["index", "ls"])
    assert (options.address, options.namespace) == ("/run/containerd/containerd.sock", "default")
    assert (options.timeout, options.content_store, str(options.root)) == (
        None,
        None,
        "/var/lib/soci-snapshotter-grpc",
    )
    monkeypatch.setenv("CONTAINERD_ADDRESS", "/c.sock")
    monkeypatch.setenv("CONTAINERD_NAMESPACE", "k8s.io")
    options = build_parser().parse_args(["index", "ls"])
    assert (options.address, options.namespace) == ("/c.sock", "k8s.io")
    options = build_parser().parse_args(["-a", "/d.sock", "index", "ls", "-n", "moby"])
    assert (options.address, options.namespace) == ("/d.sock", "moby")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("0", None), ("0s", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert build_parser().parse_args(["--timeout", text, "index", "ls"]).timeout == seconds


USAGE = {
    "no command": ([], "required: COMMAND; see `soci --help`"),
    "no such command": (["convert-all"], "invalid choice: 'convert-all'"),
    "no image": (["create"], "required: IMAGE; see `soci create --help`"),
    "span size": (["create", "--span-size", "4MiB", "x"], "argument --span-size: invalid int value: '4MiB'"),
    "negative span size": (["create", "--span-size", "-1", "x"], "span size -1: must not be negative"),
    "build tool": (
        ["create", "--build-tool-identifier", "\udcff", "x"],
        r"build tool identifier '\udcff': is not UTF-8",
    ),
    "prefetch": (
        ["create", "--prefetch-file", "", "x"],
        "prefetch: an empty name; `/` stands for everything",
    ),
    "large span size": (
        ["create", "--span-size", str(1 << 63), "x"],
        "span size 9223372036854775808: a zTOC holds at most 9223372036854775807",
    ),
    "uploads": (["push", "--max-concurrent-uploads", "-1", "x"], "'-1' is not a number of uploads"),
    "existing index": (["push", "--existing-index", "keep", "x"], "invalid choice: 'keep'"),
    "no tag": (
        ["convert", "--registry", "r.example/x:1", "r.example/y"],
        "destination r.example/y: needs a tag",
    ),
    "digest": (["ztoc", "info", "sha256:zz"], "write it as sha256:<64 hex digits>"),
    "duration": (["--timeout", "soon", "index", "ls"], "'soon' is not a duration; write 30s, 1m30s or 500ms"),
    "store": (["--content-store", "s3", "index", "ls"], "invalid choice: 's3'"),
    "platform": (["create", "-p", "a/b/c/d", "x", "--oci-layout", "/"], "OCI layout /: it has no index.json"),
    "reference": (["image", "rpull", "UPPER/case:x y"], "image reference 'UPPER/case:x y'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line_with_the_fix(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = USAGE[case]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("soci: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unreachable_containerd_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", str(tmp_path / "c.sock"), "create", "app"]) == 1
    assert f"soci: cannot reach containerd at {tmp_path}/c.sock (No such file" in capsys.readouterr().err


def test_trouble_with_files_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout/index.json").mkdir()
    assert main(["create", "--oci-layout", str(tmp_path / "layout"), "app"]) == 1
    assert capsys.readouterr().err == f"soci: {tmp_path}/layout/index.json: Is a directory\n"


def test_debug_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "--address", str(tmp_path / "c.sock"), "create", "app"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("soci: cannot reach")


def test_an_interrupted_pull_leaves_nothing(server: Server, containerd: Containerd, tmp_path: Path) -> None:
    image = ImageBuilder(tmp_path).layer({"a": os.urandom(9)}).layer({"b": os.urandom(9)}).build()
    contents = [blob.content for blob in image.layers if isinstance(blob.content, bytes)]
    with Registry() as registry:
        stored = registry.add_image(contents)
        registry.fault(Stall(path=f"/blobs/{stored.layers[1].digest}", count=-1))
        command = [*PROGRAM, "--address", str(server.address), "--namespace", server.namespace]
        process = subprocess.Popen(
            [*command, "image", "rpull", "--snapshotter", "overlayfs", stored.name],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        wait_until(lambda: len(containerd.snapshots("overlayfs").list()) == 2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "soci: interrupted\n")
    assert server.ctr("leases", "ls", "--quiet") == ""
    assert containerd.images.list() == []
    assert containerd.content.ingests() == []
    assert [one.committed for one in containerd.snapshots("overlayfs").list()] in ([], [True])


def wait_until(done: object) -> None:
    assert callable(done)
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "not within 60 s"
        time.sleep(0.05)


def test_the_time_limit_ends_a_build(soci: Soci, tmp_path: Path) -> None:
    image = ImageBuilder(tmp_path).add(layer({"a": bytes(400 << 20)}, level=1)).build()
    error = soci.fails(
        *("--timeout", "30ms", "create", "--min-layer-size", "0", "--oci-layout", image.layout, "app")
    )
    assert error == "not done within 0.03 s (--timeout)"
    assert not any(thread.name.startswith("layer") for thread in threading.enumerate())


@pytest.mark.parametrize(
    "command",
    [
        "",
        "create",
        "push",
        "image rpull",
        "index list",
        "index info",
        "index remove",
        "ztoc list",
        "ztoc get-file",
    ],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command.split(), "--help"])
    assert exit_info.value.code == 0
    assert f"usage: soci {command}".rstrip() in capsys.readouterr().out


def test_output_to_a_closed_pipe_is_no_drama(tmp_path: Path) -> None:
    command = f"{' '.join(PROGRAM)} create --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_a_nursery_raises_the_error_that_says_most() -> None:
    async def fail(error: BaseException) -> None:
        raise error

    async def both() -> None:
        async with open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("a defect"))
            nursery.start_soon(fail, NotFound("ours"))

    with pytest.raises(NotFound, match="ours"):
        trio.run(both)


def test_first_error() -> None:
    ours, defect = UsageError("ours"), ValueError("defect")
    assert first_error(ExceptionGroup("", [defect, ExceptionGroup("", [ours])])) is ours
    assert first_error(ExceptionGroup("", [defect])) is defect
    interrupt = KeyboardInterrupt()
    assert first_error(BaseExceptionGroup("", [SnapshotterError(), interrupt])) is interrupt
