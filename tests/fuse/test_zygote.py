"""The world of the zygote's children: what they have, and what they cannot get."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapshotter import messages
from tests.support.probezygote import TRIES
from tests.support.process import is_alive, wait_until

UID = 0x6E00_0007
pytestmark = pytest.mark.usefixtures("root")


@dataclass
class Child:
    """A child as the daemon gets it."""

    pid: int
    pidfd: int
    answer: socket.socket

    def ended(self, seconds: float = 60) -> bool:
        """Wait for its end."""
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def proc(self, name: str) -> str:
        """Return one of its files in /proc."""
        return Path(f"/proc/{self.pid}/{name}").read_text(encoding="ascii", errors="replace")

    def status(self) -> dict[str, str]:
        """Return /proc/PID/status."""
        pairs = (line.partition(":") for line in self.proc("status").splitlines())
        return {name: value.strip() for name, _, value in pairs}

    def descriptors(self) -> dict[int, str]:
        """Return what is behind each of its descriptors."""
        directory = f"/proc/{self.pid}/fd"
        return {int(fd): os.readlink(f"{directory}/{fd}") for fd in os.listdir(directory)}


class Zygote:
    """The zygote with the jobs of tests/support/probezygote.py."""

    def __init__(self, empty_root: Path) -> None:
        self.control, far = messages.pair()
        self.control.settimeout(60)
        self.lock = os.memfd_create("inherited", 0)
        command = [sys.executable, "-m", "tests.support.probezygote", str(far.fileno()), str(empty_root)]
        # Whoever measures coverage in the zygote writes its file into the empty root.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        with far:
            self.process = subprocess.Popen(
                [*command, "error"],
                env=environ,
                pass_fds=[far.fileno(), self.lock],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.children: list[Child] = []

    def ask(self, job: str, fds: Mapping[str, int], **arguments: Any) -> messages.Message:
        """Ask for a child and return the whole answer, its pidfd under "pidfd"."""
        message = {"id": 7, "job": job, "uid": UID, "names": list(fds), "arguments": arguments}
        messages.send(self.control, message, list(fds.values()))
        received = messages.receive(self.control)
        assert received is not None, "the zygote has ended"
        answer, got = received
        return answer | ({"pidfd": got[0]} if got else {})

    def fork(self, job: str, *, fds: Mapping[str, int] | None = None, **arguments: Any) -> Child:
        """Return a new child; it has the other end of its `answer` and `fds`."""
        near, far = messages.pair()
        near.settimeout(60)
        with far:
            answer = self.ask(job, {"answer": far.fileno(), **(fds or {})}, **arguments)
        child = Child(answer["pid"], answer["pidfd"], near)
        self.children.append(child)
        return child

    def close(self) -> None:
        """End everything."""
        for child in self.children:
            child.answer.close()
            assert child.ended()
            os.close(child.pidfd)
        self.control.close()
        assert self.process.wait(60) == 0
        os.close(self.lock)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    root = tmp_path_factory.mktemp("empty")
    root.chmod(0o555)
    zygote = Zygote(root)
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def child(zygote: Zygote) -> Child:
    """A child that stays."""
    with open(os.devnull, "rb") as given:
        return zygote.fork("probe", fds={"given": given.fileno()}, number=3)


@pytest.fixture(scope="module")
def report(child: Child) -> messages.Message:
    """What the child says of its tries."""
    received = messages.receive(child.answer)
    assert received is not None
    return received[0]


def test_it_gets_its_arguments_and_names(report: messages.Message) -> None:
    assert report["arguments"] == {"number": 3}
    assert report["names"] == ["answer", "given"]


def test_it_has_a_user_of_its_own_and_no_group(child: Child, report: messages.Message) -> None:
    status = child.status()
    assert status["Uid"].split() == [str(UID)] * 4
    assert status["Gid"].split() == [str(UID)] * 4
    assert status["Groups"] == ""


def test_it_has_no_capability_and_cannot_gain_one(child: Child, report: messages.Message) -> None:
    status = child.status()
    assert {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {
        "CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapAmb": 0,
    }  # fmt: skip
    assert status["NoNewPrivs"] == "1"


def test_it_leaves_no_core(child: Child, report: messages.Message) -> None:
    (limit,) = [line for line in child.proc("limits").splitlines() if line.startswith("Max core file size")]
    assert limit.split()[4:6] == ["0", "0"]


def test_its_root_is_empty(child: Child, report: messages.Message, zygote: Zygote) -> None:
    assert os.listdir(f"/proc/{child.pid}/root") == []
    assert os.path.samefile(f"/proc/{child.pid}/cwd", f"/proc/{child.pid}/root")
    assert report["list the root"] == report["leave the root"] == "allowed []"


def test_its_network_is_empty(child: Child, report: messages.Message) -> None:
    assert os.readlink(f"/proc/{child.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    devices = [line.split(":")[0].strip() for line in child.proc("net/dev").splitlines()[2:]]
    assert devices == ["lo"]
    assert child.proc("net/fib_trie") == ""  # no address anywhere: even lo is down


def test_it_has_exactly_the_descriptors_it_was_given(child: Child, report: messages.Message) -> None:
    names = sorted(child.descriptors().values())
    sockets = [name for name in names if name.startswith("socket:")]
    assert len(sockets) == 1  # its own; neither the zygote's nor any other child's
    standard = {child.descriptors()[number] for number in (0, 1, 2)}
    others = set(names) - set(sockets) - standard
    assert others <= {"/dev/null", "/memfd:inherited (deleted)"}
    assert names.count("/memfd:inherited (deleted)") == 1


def test_what_it_tries_is_refused(report: messages.Message) -> None:
    outcomes = {name: report[name] for name in TRIES}
    allowed = {name for name, outcome in outcomes.items() if outcome.startswith("allowed")}
    assert allowed == {"list the root", "leave the root"}
    assert outcomes["open /etc/passwd"] == "FileNotFoundError"
    assert outcomes["become root"] == outcomes["signal root's processes"] == "PermissionError"


@pytest.mark.parametrize("job", ["return", "raise", "crash"])
def test_the_end_of_a_child_is_seen_and_harms_nobody(zygote: Zygote, job: str, child: Child) -> None:
    ending = zygote.fork(job)
    assert ending.ended()
    wait_until(lambda: not is_alive(ending.pid), timeout=60, what="the zygote does not keep it as a zombie")
    assert is_alive(child.pid)
    assert zygote.process.poll() is None


def test_a_child_that_ends_at_once_is_none_that_could_not_be_started(zygote: Zygote) -> None:
    """Its pidfd is opened while it still is there, however slow the zygote is."""
    for _ in range(50):
        answer = zygote.ask("return", {})
        assert "error" not in answer
        os.close(answer["pidfd"])


def test_the_zygote_keeps_no_descriptor_of_its_children(zygote: Zygote) -> None:
    directory = f"/proc/{zygote.process.pid}/fd"
    messages.send(zygote.control, {"id": 1, "job": "return", "uid": UID, "names": [], "arguments": {}})
    assert messages.receive(zygote.control) is not None
    wait_until(lambda: len(os.listdir(directory)) == 5, timeout=60, what="its own descriptors alone")
    for _ in range(3):
        with open(os.devnull, "rb") as given:
            zygote.fork("return", fds={"given": given.fileno()})
    wait_until(lambda: len(os.listdir(directory)) == 5, timeout=60, what="nothing of its children is kept")


def test_names_without_descriptors_end_the_child_only(zygote: Zygote) -> None:
    message = {"id": 1, "job": "return", "uid": UID, "names": ["missing"], "arguments": {}}
    messages.send(zygote.control, message)
    received = messages.receive(zygote.control)
    assert received is not None
    (pidfd,) = received[1]
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    assert zygote.process.poll() is None


def test_a_zygote_without_a_daemon_ends(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    zygote = Zygote(tmp_path / "empty")
    zygote.close()


def test_a_zygote_dies_with_its_daemon(tmp_path: Path) -> None:
    """Also when it is busy: the parent's death is a signal."""
    (tmp_path / "empty").mkdir()
    code = (
        "import subprocess, sys, os\n"
        "from snapshotter import messages\n"
        "near, far = messages.pair()\n"
        "child = subprocess.Popen([sys.executable, '-m', 'snapshotter.fuse.zygote', str(far.fileno()),"
        " sys.argv[1], 'error'], pass_fds=[far.fileno()])\n"
        "messages.send(near, {'id': 1, 'job': 'compile', 'uid': 1, 'names': [], 'arguments': {}})\n"
        "messages.receive(near)\n"
        "print(child.pid, flush=True)\n"
        "os.set_inheritable(near.fileno(), True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "empty")], capture_output=True, text=True, check=False
    )
    pid = int(result.stdout)
    wait_until(lambda: not is_alive(pid), timeout=60, what="the zygote has ended")
