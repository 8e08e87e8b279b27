"""The tools that other tests rest on, held to their own word: on real programs, processes and namespaces."""

import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.support import host, images, sources, treedump
from tests.support.containerd import Containerd
from tests.support.dockerregistry import Credentials, DockerRegistry
from tests.support.images import Entry, ImageBuilder
from tests.support.netns import Link, Network
from tests.support.process import (
    Daemon,
    Service,
    accepts_connections,
    end_all,
    is_alive,
    kill_and_wait,
    naming,
    to_toml,
    usage,
    wait_until,
)

TREE: dict[str, Entry | bytes] = {
    "etc/": images.directory(0o750, uid=7),
    "etc/plain": b"plain\n" * 1000,
    "etc/tagged": Entry(b"x", mode=0o4755, pax={"SCHILY.xattr.user.k": "v\n"}),
    "link": images.symlink("etc/plain"),
    "twin": images.hardlink("etc/plain"),
    "null": Entry(type=tarfile.CHRTYPE, mode=0o666, major=1, minor=3),
}


# --- images


def test_the_same_values_give_the_same_bytes() -> None:
    assert images.layer(TREE) == images.layer(TREE)


@pytest.mark.parametrize("compression", ["gzip", "members", "zstd", "uncompressed"])
def test_a_layer_holds_its_tar(compression: str) -> None:
    data = images.tar({"big": os.urandom(3 << 20)})
    blob = images.tar_layer(data, compression=compression)
    assert isinstance(blob.content, bytes)
    assert blob.digest == images.sha256(blob.content)
    assert blob.diff_id == images.sha256(data)
    if compression in ("gzip", "members"):
        assert gzip.decompress(blob.content) == data
        assert (blob.content.count(b"\x1f\x8b\x08\x00\x00\x00\x00\x00") > 1) == (compression == "members")


def test_a_tar_may_repeat_names_and_hold_what_is_not_text() -> None:
    odd = b"odd-\xff".decode("utf-8", "surrogateescape")
    data = images.tar([("a", b"1"), ("a", b"2"), (odd, b"")])
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        assert archive.getnames() == ["a", "a", odd]


def test_a_gzip_file_becomes_a_layer_as_it_is(tmp_path: Path) -> None:
    data = images.tar(TREE)
    path = tmp_path / "layer.tar.gz"
    path.write_bytes(gzip.compress(data, 1))
    blob = images.gzip_file_layer(path)
    assert (blob.digest, blob.diff_id) == (images.sha256(path.read_bytes()), images.sha256(data))
    image = ImageBuilder(tmp_path / "oci").add(blob).build()
    assert (image.layout / "blobs/sha256" / blob.digest[7:]).read_bytes() == path.read_bytes()


def test_a_layout_keeps_one_image_for_each_tag(tmp_path: Path) -> None:
    ImageBuilder(tmp_path).layer({"a": b""}).build("one")
    ImageBuilder(tmp_path).layer({"b": b""}).build("two")
    again = ImageBuilder(tmp_path).layer({"c": b""}).config(Volumes={"/data": {}}).build("one")
    manifests = json.loads((tmp_path / "index.json").read_text())["manifests"]
    assert [one["annotations"]["org.opencontainers.image.ref.name"] for one in manifests] == ["two", "one"]
    assert manifests[1]["digest"] == again.digest


# --- processes

SLEEPER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("ready", flush=True)
import time; time.sleep(60)
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Service]:
    """A service that starts an orphan-to-be."""
    service = Service([sys.executable, "-c", SLEEPER], log=tmp_path / "log")
    service.start()
    try:
        service.wait_ready(lambda: "ready" in service.log_text())
        yield service
    finally:
        service.cleanup()


def test_orphans_are_found_measured_and_ended(sleeper: Service) -> None:
    wait_until(lambda: len(sleeper.processes()) == 2, timeout=60, what="both processes")
    cost = sleeper.usage()
    assert cost.pss > 1 << 20
    assert sleeper.kill() == -signal.SIGKILL
    assert len(sleeper.processes()) == 1
    end_all(sleeper.tag)
    assert sleeper.processes() == set()
    assert usage([sleeper.pid]).pss == 0


def test_the_end_of_a_service_is_what_it_was(sleeper: Service) -> None:
    assert sleeper.stop() == -signal.SIGTERM
    assert not sleeper.alive


def test_a_service_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    service = Service([sys.executable, "-c", "print('cannot, because')"], log=tmp_path / "log")
    service.start()
    with pytest.raises(AssertionError, match=r"ended before it was ready\n(.|\n)*cannot, because"):
        service.wait_ready(lambda: False)


def test_a_service_that_ignores_its_end_is_killed(tmp_path: Path) -> None:
    program = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    service = Service([sys.executable, "-c", program], log=tmp_path / "log")
    service.start()
    service.wait_ready(lambda: "up" in service.log_text())
    with pytest.raises(AssertionError, match="ignored SIGTERM"):
        service.stop(timeout=0.2)
    assert not service.alive


def test_one_process_is_killed_by_descriptor() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        kill_and_wait(process.pid)
        assert not is_alive(process.pid)
    kill_and_wait(process.pid)  # gone: no error


def test_processes_are_found_by_what_they_name(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()", tmp_path / "inside"], stdin=subprocess.PIPE
    ) as child:
        wait_until(lambda: naming(tmp_path) == {child.pid}, timeout=60, what="the child is found")
        child.communicate(b"\n")
    assert naming(tmp_path) == set()


def test_a_socket_without_a_listener_does_not_accept(workdir: Path) -> None:
    path = workdir / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not accepts_connections(path)
        listener.listen()
        assert accepts_connections(path)


def test_values_become_toml() -> None:
    values = {"a": 1, "b": [True, "x\ny"], "c.d": {"e": {"f": 1.5}, "g": "ü"}, "h": "last"}
    assert tomllib.loads(to_toml(values)) == values


# --- mounts


def test_mounts_are_found_and_detached(root: None, workdir: Path) -> None:
    target = workdir / "with space"
    (target / "inner").mkdir(parents=True)
    for place in (target, target / "inner"):
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
    with (target / "inner/busy").open("w"):
        assert [entry.target for entry in host.mounts_below(workdir)] == [target, target / "inner"]
        assert host.detach_below(workdir) == 2
    assert host.mounts_below(workdir) == []
    host.detach(target)  # not mounted: no error


# --- the tree dump


def test_a_dump_tells_everything(root: None, tmp_path: Path) -> None:
    before = time.time_ns()
    with tarfile.open(fileobj=io.BytesIO(images.tar(TREE))) as archive:
        archive.extractall(tmp_path)
    os.setxattr(tmp_path / "etc/tagged", "user.k", b"v\n")
    os.mkfifo(tmp_path / "pipe", 0o600)
    entries = {json.loads(line)["path"]: json.loads(line) for line in treedump.lines(os.fsencode(tmp_path))}
    assert list(entries) == [".", "etc", "etc/plain", "etc/tagged", "link", "null", "pipe", "twin"]
    assert entries["etc"].items() >= {"type": "directory", "mode": "0o750", "uid": 7}.items()
    assert entries["etc/tagged"]["xattrs"] == {"user.k": "v\\n"}
    assert entries["etc/tagged"]["mode"] == "0o4755"
    assert entries["twin"]["same_as"] == entries["etc/plain"]["same_as"] == "etc/plain"
    assert entries["twin"]["nlink"] == 2
    assert entries["etc/plain"]["sha256"] == images.sha256(b"plain\n" * 1000)[7:]
    assert entries["link"]["target"] == "etc/plain"
    assert entries["null"]["rdev"] == "1:3"
    assert entries["pipe"]["type"] == "fifo"
    times = [
        json.loads(line)["mtime_ns"]
        for line in treedump.comparable(map(json.dumps, entries.values()), since_ns=before)
    ]
    assert times[0] == times[6] == "since"
    assert times[2] == images.MTIME * 10**9


# --- registry, containerd, network


@pytest.fixture(scope="module")
def registry(session_workdir: Path) -> Iterator[DockerRegistry]:
    server = DockerRegistry(session_workdir / "registry").start()
    try:
        yield server
    finally:
        server.cleanup()


def test_a_registry_counts_what_it_serves(registry: DockerRegistry, tmp_path: Path) -> None:
    image = ImageBuilder(tmp_path).layer(TREE).layer({"z": b"z"}, compression="zstd").build()
    registry.push(image, "some/name", "v1")
    mark = registry.mark()
    assert images.sha256(registry.get("/v2/some/name/manifests/v1")) == image.digest
    blob = image.layers[1]
    assert images.sha256(registry.get(f"/v2/some/name/blobs/{blob.digest}")) == blob.digest
    manifest, whole = registry.requests(mark)
    assert (manifest.kind, manifest.status) == ("manifest", 200)
    assert (whole.kind, whole.size, whole.is_range) == ("blob", blob.size, False)
    assert registry.blob_path(blob.digest).read_bytes() == blob.content


def test_a_registry_keeps_its_port(registry: DockerRegistry) -> None:
    name = registry.name
    registry.stop()
    assert registry.start().name == name


def test_a_registry_with_tls_and_credentials(root: None, workdir: Path, tmp_path: Path) -> None:
    server = DockerRegistry(workdir, tls=True, credentials=Credentials("user", "a pass")).start()
    try:
        server.push(ImageBuilder(tmp_path).layer(TREE).build(), "private")
        with pytest.raises(HTTPError, match="401"):
            server.get("/v2/private/manifests/latest")
    finally:
        server.cleanup()


def test_containerd_pulls_runs_and_leaves_nothing(
    root: None, registry: DockerRegistry, workdir: Path, tmp_path: Path
) -> None:
    reference = registry.push(ImageBuilder(tmp_path).layer(TREE).layer({".wh.twin": b""}).build(), "tree")
    containerd = Containerd(workdir)
    try:
        containerd.start().pull(reference)
        dumped = [json.loads(line) for line in containerd.dump_tree(reference)]
        shown = {entry["path"]: entry for entry in dumped if entry.get("type") != "mountpoint"}
        assert set(shown) == {".", "etc", "etc/plain", "etc/tagged", "link", "null"}
        assert shown["etc/tagged"]["xattrs"] == {"user.k": "v\\n"}
        containerd.kill()
        containerd.start()
        assert containerd.dump_tree(reference)
        with pytest.raises(AssertionError, match="no-such-program"):
            containerd.run(reference, "/no-such-program")
    finally:
        containerd.cleanup()
    assert host.mounts_below(workdir) == []
    assert containerd.ctr("version", check=False).count("Server") == 0


def test_a_slow_link_is_slow_and_can_be_cut(root: None, tmp_path: Path) -> None:
    program = "import socket, sys; s = socket.create_server((sys.argv[1], 7)); print(1, flush=True); s.accept(); s.accept()"
    connect = "import socket, sys, time; t = time.time(); socket.create_connection((sys.argv[1], 7), float(sys.argv[2])); print(time.time() - t)"
    with Network(tmp_path, Link(delay=0.02)) as network:
        server = subprocess.Popen(
            [*network.server.prefix, sys.executable, "-c", program, network.server.address],
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            client = [*network.client.prefix, sys.executable, "-c", connect, network.server.address]
            result = subprocess.run([*client, "30"], capture_output=True, text=True, timeout=60, check=True)
            assert float(result.stdout) >= 0.04
            network.shape(Link(cut=True))
            time.sleep(0.2)
            result = subprocess.run([*client, "0.5"], capture_output=True, text=True, timeout=60, check=False)
            assert "timed out" in result.stderr
        finally:
            server.kill()
            server.communicate()
    assert not Path(f"/run/netns/{network.client.namespace}").exists()


def test_the_daemon_under_test_is_started_read_killed_and_ended(fuse: None, workdir: Path) -> None:
    daemon = Daemon(workdir, {"log_level": "debug"})
    try:
        daemon.start()
        assert {record["level"] for record in daemon.records()} <= {"debug", "info"}, daemon.log_text()
        assert all(value >= 0 for value in daemon.metrics().values())
        assert daemon.status()
        first = daemon.pid
        daemon.kill()
        daemon.start()
        assert daemon.pid != first
        assert len(daemon.processes()) > 1
        assert daemon.usage().pss > 10 << 20
    finally:
        daemon.cleanup()
    assert daemon.processes() == set()
    assert host.mounts_below(workdir) == []


# --- sources


def test_imports_are_resolved_to_modules(tmp_path: Path) -> None:
    package = tmp_path / "snapshotter"
    (package / "a").mkdir(parents=True)
    for name in ("__init__", "a/__init__", "a/b", "c"):
        (package / f"{name}.py").write_text("")
    (package / "a/d.py").write_text(
        "from . import b\nfrom ..c import x\nimport os.path\ndef f():\n    from snapshotter.a import b, y\n"
    )
    known = sources.modules(tmp_path)
    found = sources.imports(known["snapshotter.a.d"], known)
    assert set(found) == {"snapshotter.a.b", "snapshotter.c", "os.path", "snapshotter.a"}
    assert found["snapshotter.c"] == 2
    assert sources.unit_of("snapshotter.a.d") == "a"


def test_cycles_are_found() -> None:
    assert sources.cycles({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": [], "e": ["e"]}) == [
        ["a", "b", "c"],
        ["e"],
    ]
    assert sources.cycles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_waiting_ends(tmp_path: Path) -> None:
    flag = threading.Event()
    threading.Timer(0.05, flag.set).start()
    wait_until(flag.is_set, timeout=60, what="the flag")
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: never"):
        wait_until(lambda: False, timeout=0.05, what="never")
