"""Programs under test: started, waited for, measured, and ended with everything that they started.

Every `Service` marks the environment of its program with a tag of its own; children inherit it, and the
kernel keeps it readable. So what must end is found whatever became of parents and process groups, and nothing
that somebody else started is ever touched.

Concurrency: one thread drives a `Service`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import host

_TAG = "SNAPSHOTTER_TEST_TAG"
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """What a set of processes costs: proportional memory in bytes, processor time in seconds."""

    pss: int
    cpu: float


def wait_until(condition: Callable[[], object], *, timeout: float, what: str) -> None:
    """Return when `condition()` is true; raise AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody has, and that the kernel gives to nobody by itself.

    One of those that it does give could be somebody's by the time it is bound: a connection's, say.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(min(10_000, lowest - 1000), lowest)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def open_descriptors() -> int:
    """Return how many descriptors this process has, without what earlier tests have left for the garbage collector."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def accepts_connections(path: Path) -> bool:
    """Tell whether something listens on the unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _stat_fields(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Tell whether `pid` runs; a zombie does not."""
    try:
        return _stat_fields(pid)[0] not in "ZX"
    except OSError:
        return False


def is_asleep(pid: int) -> bool:
    """Tell whether every thread of `pid` waits for something else than a processor or a disk."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
        return all(
            task.read_text(errors="replace").rpartition(")")[2].split()[0] == "S"
            for task in Path(f"/proc/{pid}/task").glob("*/stat")
        )
    return False


def descendants(roots: Iterable[int]) -> set[int]:
    """Return `roots` and every process below them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat_fields(int(name))[1]), []).append(int(name))
    found: set[int] = set()
    stack = list(roots)
    while stack:
        pid = stack.pop()
        if pid not in found:
            found.add(pid)
            stack += children.get(pid, [])
    return found


def tagged(tag: str) -> set[int]:
    """Return the living processes whose environment carries `tag`, and everything below them."""
    needle = f"{_TAG}={tag}".encode()
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    found.add(int(name))
    return {pid for pid in descendants(found) if is_alive(pid)} - {os.getpid()}


def naming(directory: Path) -> set[int]:
    """Return the living processes whose command line names something at or below `directory`."""
    needle = os.fsencode(directory)
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if needle in file.read():
                    found.add(int(name))
    return {pid for pid in found if is_alive(pid)} - {os.getpid()}


def settle(directory: Path, *, timeout: float = 30.0) -> set[int]:
    """Return what `naming` still finds after up to `timeout` seconds; normally nothing, and soon."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not naming(directory), timeout=timeout, what="they have ended")
    return naming(directory)


def end_all(tag: str, *, timeout: float = 60.0) -> None:
    """Kill every process with `tag` and all below. Raises AssertionError when one stays."""

    def gone() -> bool:
        remaining = tagged(tag)
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not remaining

    wait_until(gone, timeout=timeout, what=f"every process tagged {tag} has ended")


def usage(pids: Iterable[int]) -> Usage:
    """Return what `pids` cost together; a process that is gone counts nothing."""
    pss, ticks = 0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = _stat_fields(pid)
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                pss += sum(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
            ticks += int(fields[11]) + int(fields[12])
    return Usage(pss, ticks / _CLOCK_TICKS)


class Service:
    """A program that runs until it is ended, its output in a file.

    The file is appended to: it holds every life of the program. `tag` marks all its processes.
    """

    def __init__(
        self, command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self.env = dict(env or {})
        self.tag = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process of this life. Raises AssertionError when there is none."""
        assert self._process is not None, f"{self.command[0]} was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the program runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the program; it need not be ready yet."""
        assert not self.alive, f"{self.command[0]} runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.env, _TAG: self.tag},
                start_new_session=True,
            )

    def wait_ready(self, ready: Callable[[], object], *, timeout: float = 60.0) -> None:
        """Return when `ready()` is true. Raises AssertionError with the end of the log when that fails."""
        try:
            wait_until(lambda: not self.alive or ready(), timeout=timeout, what=f"{self.command[0]} is ready")
            assert self.alive, f"{self.command[0]} ended before it was ready"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_text()[-4000:]}") from None

    def stop(self, *, timeout: float = 60.0) -> int:
        """Ask the program to end, wait, and return its exit code (negative: the signal).

        Raises AssertionError, after killing it, when it does not end in `timeout` seconds.
        """
        return self._end(signal.SIGTERM, timeout)

    def kill(self) -> int:
        """End this one process as a crash would (SIGKILL); what it started goes on."""
        return self._end(signal.SIGKILL, 60.0)

    def _end(self, number: signal.Signals, timeout: float) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout)
            raise AssertionError(
                f"{self.command[0]} ignored {number.name}\n{self.log_text()[-4000:]}"
            ) from None

    def processes(self) -> set[int]:
        """Return the program's processes, grandchildren and orphans too."""
        return tagged(self.tag)

    def usage(self) -> Usage:
        """Return what all its processes cost at the moment."""
        return usage(self.processes())

    def log_text(self) -> str:
        """Return everything that the program has printed in all its lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def cleanup(self) -> None:
        """End the program and everything it started, at once."""
        with contextlib.suppress(AssertionError):
            self.kill()
        end_all(self.tag)


class Daemon(Service):
    """The snapshotter's daemon under test, in `directory` (short: it holds the socket), with its own root.

    `config` is the content of config.toml as Python values, to which an address for /metrics is added, or its text.
    The holder and other roles outlive `stop` and `kill`, as they do in production; `cleanup` ends them and
    detaches their mounts. `prefix` is a command put before the daemon's own, say to enter a network namespace.
    """

    program = "snapshotter.daemon.main"
    """The module that is started; `tests.support.oldkernel` is the same on an older kernel."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any] | str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory = directory.resolve()
        self.root = self.directory / "root"
        self.address = self.directory / "snapshotter.sock"
        self.config = self.directory / "config.toml"
        self.metrics_address = f"127.0.0.1:{free_port()}"
        self.directory.mkdir(parents=True, exist_ok=True)
        if not isinstance(config, str):
            config = to_toml({"metrics_address": self.metrics_address, **(config or {})})
        self.config.write_text(config)
        self._prefix = list(prefix)
        super().__init__(
            [*prefix, sys.executable, "-m", self.program, *self.options()],
            log=self.directory / "daemon.log",
            env=env,
        )

    def options(self) -> list[str]:
        """Return the options that name this daemon, for its own subcommands too."""
        return ["--config", str(self.config), "--address", str(self.address), "--root", str(self.root)]

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the daemon and return when it answers on its socket."""
        super().start()
        self.wait_ready(lambda: accepts_connections(self.address), timeout=timeout)

    def restart(self) -> None:
        """Stop it in order and start it again."""
        self.stop()
        self.start()

    def command_line(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run the daemon's program with `arguments` (say `status --json`) and return what it prints."""
        result = subprocess.run(
            [sys.executable, "-m", "snapshotter.daemon.main", *self.options(), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **self.env, _TAG: self.tag},
            check=False,
        )
        assert result.returncode == 0, f"{arguments}: exit {result.returncode}\n{result.stderr}"
        return result.stdout

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says, once the start-up test is over."""
        found: dict[str, Any] = {}

        def tested() -> bool:
            found.update(json.loads(self.command_line("status", "--json")))
            return bool(found["not_lazy_because"] != "the start-up test is not over")

        wait_until(tested, timeout=60, what="the start-up test is over")
        return found

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics, by name and labels as they are written there."""
        # By a program of its own, because the daemon may be in another network namespace.
        fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())"
        command = [*self._prefix, sys.executable, "-c", fetch, f"http://{self.metrics_address}/metrics"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
        samples = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def records(self) -> list[dict[str, Any]]:
        """Return the log as parsed lines, all roles and lives; a line that is not JSON has the key `text`."""
        records = []
        for line in self.log_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                record = {"text": line}
            records.append(record if isinstance(record, dict) else {"text": line})
        return records

    def cleanup(self) -> None:
        """End all roles, then detach what they mounted."""
        super().cleanup()
        host.detach_below(self.directory)


def kill_and_wait(pid: int, *, timeout: float = 60.0) -> None:
    """Kill one process, by a descriptor so that no other can be hit, and wait for its end."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        readable, _, _ = select.select([fd], [], [], timeout)
        assert readable, f"process {pid} outlives SIGKILL"
    finally:
        os.close(fd)


def to_toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Return `values` as TOML; mappings become tables. Strings, numbers, booleans and lists of them only."""
    plain, tables = [], []
    for key, value in values.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{_toml_value(key)}"
            tables.append(f"[{name}]\n{to_toml(value, name + '.')}")
        else:
            plain.append(f"{_toml_value(key)} = {_toml_value(value)}\n")
    return "".join(plain + tables)


def _toml_value(value: object) -> str:
    # JSON's strings, numbers, booleans and arrays of them are TOML too.
    return json.dumps(value if not isinstance(value, Path) else str(value), ensure_ascii=False)
