"""What holds for every test.

No skips: a test that needs root, /dev/fuse or a program, and cannot have it, fails. A skipped promise is an
unkept one.

No unexpected log lines: a record of WARNING or above from `snapshotter` fails the test that caused it, in this
process. A test that provokes one says so, and then it must come:

    def test_falls_back(expected_logs):
        expected_logs.allow(r"zTOC .* is missing")

`@pytest.mark.logs_unchecked` switches the guard off for a test whose subject is logging itself.

No litter: `workdir` is a directory with a short path (unix sockets fit) in which things may be mounted; at its end
mounts are detached first and nothing inside is visited. A mount that a test left there, or a process whose command line
names it, fails the test (and is ended).
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import host, process
from tests.support.containerd import remove_directory
from tests.support.registry import Registry

_PREFIX = "st-"

# How long an example takes is the machine's affair: a process that waits for a processor is no finding. The same examples
# each time, so that a change is judged by what it changes; new ones are looked for by `make fuzz` and `make chaos`, with seeds.
settings.register_profile(
    "gate", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and no test may be: {report.longrepr}"
    return report


class ExpectedLogs:
    """The patterns that a test declares, and what came."""

    def __init__(self) -> None:
        self.records: list[logging.LogRecord] = []
        self._allowed: list[re.Pattern[str]] = []

    def allow(self, pattern: str) -> None:
        """Declare that a message which `pattern` finds comes at least once."""
        self._allowed.append(re.compile(pattern))

    def verify(self) -> None:
        """Raise AssertionError for a message that was not declared, or a declared one that never came."""
        messages = [f"{record.name}: {record.getMessage()}" for record in self.records]
        surprising = [text for text in messages if not any(one.search(text) for one in self._allowed)]
        assert not surprising, "unexpected log lines:\n" + "\n".join(surprising)
        silent = [one.pattern for one in self._allowed if not any(one.search(text) for text in messages)]
        assert not silent, f"declared, but never logged: {silent}"


class _Collector(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


@pytest.fixture(autouse=True)
def expected_logs(request: pytest.FixtureRequest) -> Iterator[ExpectedLogs]:
    """The guard over log lines; see the head of this file."""
    expected = ExpectedLogs()
    collector = _Collector(expected.records)
    logger = logging.getLogger("snapshotter")
    logger.addHandler(collector)
    try:
        yield expected
    finally:
        logger.removeHandler(collector)
    if request.node.get_closest_marker("logs_unchecked") is None:
        expected.verify()


@pytest.fixture(scope="session")
def root() -> None:
    """The promise that the test runs as root."""
    assert os.geteuid() == 0, "this test needs root; run the suite as root"


@pytest.fixture(scope="session")
def fuse(root: None) -> None:
    """The promise that /dev/fuse can be opened."""
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))


@pytest.fixture(scope="session")
def session_workdir() -> Iterator[Path]:
    """A directory like `workdir` for what several tests share."""
    yield from _workdir()


@pytest.fixture(scope="module")
def module_workdir() -> Iterator[Path]:
    """A directory like `workdir` for the tests of one module."""
    yield from _workdir()


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory with a short path in which things may be mounted."""
    yield from _workdir()


def _workdir() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        yield directory
        mounts = host.mounts_below(directory)
    finally:
        # First the processes: one of them could mount again. Who ends by himself gets the time to.
        processes = process.settle(directory)
        for pid in processes:
            process.kill_and_wait(pid)
        remove_directory(directory)
    assert not mounts, f"mounts left behind: {mounts}"
    assert not processes, f"processes left behind: {processes}"


@pytest.fixture
def registry() -> Iterator[Registry]:
    """A registry over plain HTTP, without a fault."""
    with Registry() as registry:
        yield registry
