"""The services under a real systemd, with a container that reads all the while: no read may fail or hang."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.process import wait_until
from tests.systemd.conftest import Host, install

DAEMON = "soci-snapshotter-grpc.service"
SOCKET = "soci-snapshotter-grpc.socket"
HOLDER = "soci-snapshotter-holder.service"


def main_pid(host: Host, unit: str = DAEMON) -> str:
    """Return the pid of a service's main process, on the machine; "0" while there is none."""
    return host.machine.property(unit, "MainPID")


def wait_active(host: Host, unit: str = DAEMON, *, former: str = "") -> None:
    """Wait until the service is up, in another process than `former`."""
    wait_until(
        lambda: host.machine.property(unit, "ActiveState") == "active" and main_pid(host, unit) != former,
        timeout=60,
        what=f"{unit} is active",
    )


def snapshots_are_listed(host: Host) -> bool:
    """Tell whether containerd gets an answer from the snapshotter."""
    return "Committed" in host.machine.run("ctr", "snapshots", "--snapshotter", "soci", "list", check=False)


def said(host: Host, message: str) -> list[dict[str, object]]:
    """Return the daemon's log records with this message, from the journal."""
    texts = [str(entry["MESSAGE"]) for entry in host.machine.journal(DAEMON)]
    records = [json.loads(text) for text in texts if text.startswith("{")]
    return [record for record in records if record["msg"] == message]


def test_a_container_reads_lazily(host: Host) -> None:
    host.reads_on()
    (mount,) = host.status()["mounts"]
    assert mount["target"].startswith("/var/lib/soci-snapshotter-grpc/")
    checked = json.loads(host.machine.run("soci-snapshotter-grpc", "install-check", "--json"))
    assert checked["ok"], checked
    assert host.machine.systemctl("is-enabled", DAEMON, SOCKET).split() == ["enabled", "enabled"]


def test_stop_and_start_keep_mounts(host: Host) -> None:
    before, holder = host.mounts(), main_pid(host, HOLDER)
    # Stopping the daemon alone would not last: containerd's next request starts it.
    host.machine.systemctl("stop", SOCKET)
    assert host.machine.property(DAEMON, "ActiveState") == "inactive"
    assert host.mounts() == before
    host.machine.systemctl("start", DAEMON)
    assert host.machine.property(SOCKET, "ActiveState") == "active"
    host.reads_on()
    assert host.mounts() == before
    assert main_pid(host, HOLDER) == holder
    # While there was no socket containerd's client backed off, for up to three seconds.
    wait_until(lambda: snapshots_are_listed(host), timeout=60, what="containerd has connected again")


def test_a_restart_fails_no_read(host: Host) -> None:
    before, former = host.mounts(), main_pid(host)
    host.machine.systemctl("restart", DAEMON)
    assert main_pid(host) != former
    # At once where the start takes less than a second, which is what containerd's client waits before it backs off.
    wait_until(lambda: snapshots_are_listed(host), timeout=60, what="containerd gets answers again")
    host.reads_on()
    assert host.mounts() == before


def test_killed_twenty_times_in_ten_seconds(host: Host) -> None:
    before, killed = host.mounts(), "0"
    for _ in range(20):
        # Another than the last one, of whose end systemd need not have heard yet.
        wait_until(
            lambda killed=killed: main_pid(host) not in {"0", killed},
            timeout=60,
            what="there is a daemon to kill",
        )
        killed = main_pid(host)
        host.machine.systemctl("kill", "--kill-who=main", "--signal=KILL", DAEMON)
        time.sleep(0.4)
    wait_active(host, former=killed)
    host.reads_on()
    assert host.mounts() == before
    assert host.machine.property(SOCKET, "ActiveState") == "active"


def test_daemon_and_holder_killed_at_once(host: Host) -> None:
    before, former, holder = host.mounts(), main_pid(host), main_pid(host, HOLDER)
    host.machine.systemctl("kill", "--signal=KILL", DAEMON, HOLDER)
    wait_active(host, former=former)
    wait_active(host, HOLDER, former=holder)
    host.reads_on()
    assert host.mounts() == before


def test_a_reload_reads_the_configuration_again(host: Host) -> None:
    config, former = "/etc/soci-snapshotter-grpc/config.toml", main_pid(host)
    host.machine.write(config, 'log_level = "debug"\nmetrics_address = "127.0.0.1:1"\n')
    host.machine.systemctl("reload", DAEMON)
    later = "these keys take a restart, which disturbs no container"
    wait_until(lambda: said(host, later), timeout=60, what="it was reloaded")
    assert said(host, "configuration reloaded")[-1]["changed"] == ["log_level"]
    assert said(host, later)[0]["keys"] == ["metrics_address"]
    host.machine.write(config, "log_level = 5\n")
    host.machine.systemctl("reload", DAEMON)
    refused = "configuration not reloaded; the old one stays"
    wait_until(lambda: said(host, refused), timeout=60, what="the mistake is told")
    assert "config.toml:1" in str(said(host, refused)[0]["error"])
    host.machine.path(config).unlink()
    host.machine.systemctl("reload", DAEMON)
    wait_until(lambda: len(said(host, "configuration reloaded")) == 2, timeout=60, what="it was reloaded")
    wait_active(host)  # until it has said so, it is "reloading"
    assert main_pid(host) == former


def test_the_watchdog_ends_a_daemon_that_hangs(host: Host) -> None:
    # In a container with cgroup v1 systemd is not told when a group is empty, and waits for TimeoutStopSec.
    settings = "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=60s\nTimeoutStopSec=2s\n"
    host.machine.write(f"/etc/systemd/system/{DAEMON}.d/watchdog.conf", settings)
    host.machine.systemctl("daemon-reload")
    host.machine.systemctl("restart", DAEMON)
    former = main_pid(host)
    host.machine.run("kill", "-STOP", former)
    wait_active(host, former=former)
    host.reads_on()
    for text in ("Watchdog timeout", "Fatal Python error: Aborted"):  # and where each thread was
        wait_until(
            lambda text=text: text in host.machine.run("journalctl", "--no-pager", "--unit", DAEMON),
            timeout=60,
            what=f"the journal says {text!r}",
        )
    host.machine.path(f"/etc/systemd/system/{DAEMON}.d/watchdog.conf").unlink()
    host.machine.systemctl("daemon-reload")  # for the next start


def test_containerd_starts_the_daemon_by_its_socket(host: Host) -> None:
    host.machine.systemctl("stop", SOCKET)
    assert host.machine.property(DAEMON, "ActiveState") == "inactive"
    host.machine.systemctl("start", SOCKET)
    wait_until(lambda: snapshots_are_listed(host), timeout=60, what="containerd has connected again")
    wait_active(host)
    host.reads_on()


def test_the_journal_knows_priorities(host: Host) -> None:
    entries = [each for each in host.machine.journal(DAEMON) if str(each["MESSAGE"]).startswith("{")]
    levels = {(json.loads(str(each["MESSAGE"]))["level"], each["PRIORITY"]) for each in entries}
    assert (
        {("info", "6"), ("error", "3")}
        <= levels
        <= {
            ("debug", "7"),
            ("info", "6"),
            ("warning", "4"),
            ("error", "3"),
        }
    )


def test_mounts_in_use_are_not_taken_away(host: Host) -> None:
    wait_active(host)
    running = host.machine.run("soci-snapshotter-grpc", "unmount", "--all", check=False)
    assert "is in use by another snapshotter" in running
    host.machine.systemctl("stop", SOCKET)
    stopped = host.machine.run("soci-snapshotter-grpc", "unmount", "--all", check=False)
    assert "containers read from lazy layers (1, one of them at /run/containerd/" in stopped
    host.machine.systemctl("start", DAEMON)
    host.reads_on()


def test_an_upgrade_keeps_mounts_and_containers(host: Host, newer_package: Path) -> None:
    before, holder = host.mounts(), main_pid(host, HOLDER)
    install(host.machine, newer_package)
    assert host.machine.run("soci-snapshotter-grpc", "--version").split()[-1] == "99.0"
    wait_until(
        lambda: said(host, "ready")[-1]["version"] == "99.0", timeout=60, what="it says that it is ready"
    )
    host.reads_on()
    assert host.mounts() == before
    assert main_pid(host, HOLDER) == holder


def test_a_removal_waits_for_the_last_container(host: Host) -> None:
    told = host.machine.run("dpkg", "--remove", "soci-lazy-snapshotter", check=False)
    assert "stop the containers first" in told
    wait_active(host)
    host.reads_on()


def test_mounts_that_nobody_uses_are_taken_away_and_come_back(host: Host) -> None:
    host.end_reader()
    assert len(host.mounts()) == 1
    mounted = "/io.containerd.runtime.v2.task/"
    wait_until(
        lambda: mounted not in host.machine.run("cat", "/proc/self/mountinfo"),
        timeout=60,
        what="the container's root is unmounted",
    )
    # A daemon stopped in the middle of its start-up test would leave that mount too.
    wait_until(lambda: not host.status()["not_lazy_because"], timeout=60, what="the start-up test is over")
    host.machine.systemctl("stop", SOCKET)
    assert host.machine.run("soci-snapshotter-grpc", "unmount", "--all") == "1 lazy mounts taken away\n"
    assert host.mounts() == []
    host.machine.systemctl("start", DAEMON)
    assert len(host.mounts()) == 1


def test_purged_without_a_trace(host: Host) -> None:
    host.end_reader()
    host.machine.run("ctr", "images", "rm", "--sync", host.reference)
    host.machine.run("dpkg", "--purge", "soci-lazy-snapshotter")
    assert host.mounts() == []
    assert not host.machine.path("/var/lib/soci-snapshotter-grpc").exists()
    # The last of its processes may be a zombie, and its units be forgotten, a moment later.
    for command, word in (
        (("ps", "-e", "-o", "args="), "snapshotter"),
        (("systemctl", "list-units", "--all", "--no-legend", "soci*"), "soci"),
    ):
        wait_until(
            lambda command=command, word=word: word not in host.machine.run(*command),
            timeout=60,
            what=f"nothing of it is left in {' '.join(command)}",
        )
    left = host.machine.run("find", "/usr", "/etc", "/run", "-xdev", "-name", "*soci-*snapshotter*").split()
    # What the operator (these tests) wrote is the operator's.
    assert set(left) <= {f"/etc/systemd/system/{DAEMON}.d", "/etc/soci-snapshotter-grpc"}
