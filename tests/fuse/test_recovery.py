"""Requests, mounts and stored descriptors that somebody left behind, on kernels that send again and on older ones."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import trio

from snapshotter import messages
from snapshotter.errors import ProcessFailed
from snapshotter.fuse import keeper, mounting
from snapshotter.fuse.mountpoint import MountSpec, State, held_names, make_mount
from snapshotter.layer import wire
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.support.keeping import Kept, keeping, shell
from tests.support.lazylayer import LazyLayer, make_layer, make_tar

pytestmark = pytest.mark.usefixtures("fuse", "recovery")

FILES = {"a": b"A" * 70_000, "b": b"B"}


@pytest.fixture
def layer(workdir: Path) -> LazyLayer:
    return make_layer(workdir, make_tar(FILES))


async def until(condition: object) -> None:
    with trio.fail_after(60):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


def test_a_request_that_its_reader_took_along_is_answered(workdir: Path, layer: LazyLayer) -> None:
    """The daemon dies right after it has read a request: nobody has seen it but the journal, or the kernel."""
    spec = layer.spec(1, workdir / "m")
    results: list[str] = []

    async def read() -> None:
        results.append(await shell(f"cat {spec.target}/b"))

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(spec)
            mountpoint = kept.keeper.mounts[1]
            fd = os.dup(mountpoint.fd)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.lowlevel.wait_readable(fd)
            journals = [value for name, value in kept.holder.kept().items() if name.endswith(".journal")]
            reader = type(mountpoint.journal)(*journals)
            await trio.to_thread.run_sync(reader.read, fd, 0)
            reader.close()
            os.close(fd)
            async with keeping(workdir) as again:
                assert await again.keeper.restore([spec]) == []
                await until(lambda: results)
        assert results == ["B"]
        kept.holder.close()
        for journal in journals:
            os.close(journal)

    trio.run(main)


def test_an_init_that_nobody_answered_is_answered(workdir: Path, layer: LazyLayer) -> None:
    """The daemon died between storing the descriptors and answering."""
    spec = layer.spec(1, workdir / "m")

    async def main() -> None:
        async with keeping(workdir) as kept:
            device, _unique = make_mount(spec.target)
            names = held_names(1, device.init, fd=device.fd, journal_fd=device.journal_fd)
            for name, fd in names.items():
                kept.holder.put(name, fd)
            device.close()
            assert await kept.keeper.restore([spec]) == []
            assert await shell(f"cat {spec.target}/b") == "B"
            assert len(mounting.mounts_below(spec.target)) == 1

    trio.run(main)


def test_what_the_holder_has_and_is_no_mount_does_not_stop_a_start(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("keeps something unknown")
    spec = layer.spec(1, workdir / "m")

    async def main() -> None:
        async with keeping(workdir) as kept:
            with open(os.devnull, "rb") as null:  # noqa: ASYNC230
                for name in ("nonsense", "2.36-0-0.other", "1.36-131072-0", "3.36-0-0.journal"):
                    kept.holder.put(name, null.fileno())
            assert await kept.keeper.restore([spec]) == []
            assert await shell(f"cat {spec.target}/b") == "B"
            held = kept.holder.kept()
            for fd in held.values():
                os.close(fd)
            assert {"nonsense", "2.36-0-0.other"} < held.keys()  # for the version that knows them
            assert {name.split(".")[0] for name in held.keys() - {"nonsense", "2.36-0-0.other"}} == {"1"}

    trio.run(main)


def test_a_request_that_no_server_survives_is_an_error(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_logs.allow("no layer server survives")
    monkeypatch.setattr(keeper, "_STRIKES", 4)
    spec = layer.spec(1, workdir / "m")

    async def main() -> None:
        async with keeping(workdir, idle_timeout=0.3) as kept:
            mountpoint = await kept.keeper.mount(spec)
            tree = Path(spec.tree).read_bytes()
            os.truncate(spec.tree, 100)
            for _round in range(2):
                with pytest.raises(CalledProcessError) as raised:
                    await shell(f"cat {spec.target}/b")
                assert b"Input/output error" in raised.value.stderr
            # The reader has its answer before the keeper has counted it.
            await until(lambda: mountpoint.counters.snapshot()["given_up_requests"] >= 2)
            Path(spec.tree).write_bytes(tree)
            assert await shell(f"cat {spec.target}/b") == "B"
            await kept.until(1, State.ASLEEP)
            assert mountpoint.short_lives == 0

    trio.run(main)


def test_a_read_that_waits_outlives_its_servers(workdir: Path) -> None:
    layer = make_layer(workdir, make_tar(FILES), inflated=False)
    errors: list[bytes] = []
    gate = SilentGate()

    async def main() -> None:
        async with keeping(workdir, read_budget=20.0, gate=gate) as kept:
            spec = layer.spec(1, workdir / "m")
            await kept.keeper.mount(spec)

            async def read() -> None:
                with pytest.raises(CalledProcessError) as raised:
                    await shell(f"cat {spec.target}/a")
                errors.append(raised.value.stderr)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for life in range(1, 4):
                    await until(lambda: _is_waiting(kept, life))  # noqa: B023 - called at once
                    os.kill(kept.keeper.mounts[1].pid, signal.SIGKILL)
                # Pages that were read ahead are asked for once more.
                while not errors or kept.keeper.counters(1)["reads_waiting"]:
                    gate.say_no(2)
                    await trio.sleep(0.05)
            assert b"Input/output error" in errors[0]
            assert kept.keeper.counters(1)["adoptions"] == 4
        gate.close()

    trio.run(main)


def _is_waiting(kept: Kept, life: int) -> bool:
    """Tell whether the server of so many is at work; it is before the keeper hears of its start."""
    counters = kept.keeper.counters(1)
    is_known = kept.keeper.mounts[1].state is State.AWAKE
    return is_known and counters["adoptions"] == life and counters["reads_waiting"] > 0


class DroppingGate:
    """A fetcher that hangs up on the first socket."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.refused = 0

    def connect(self, layer: Digest) -> int | None:
        """Return a new socket."""
        near, far = messages.pair()
        self.ends.append(far)
        if len(self.ends) == 1:
            far.close()
        return near.detach()

    def refuse(self) -> None:
        """Say no to what was asked on the other sockets until now; how many there are depends on who is faster."""
        for end in self.ends[1:]:
            end.setblocking(False)
            with suppress(OSError):
                while packet := end.recv(wire.PACKET_SIZE):
                    message = wire.decode(packet)
                    if isinstance(message, wire.Want):
                        end.send(wire.encode(wire.Failed(message.first, errno.EIO)))
                        self.refused += 1


def test_a_server_that_lost_its_fetcher_is_given_another_socket(workdir: Path) -> None:
    layer = make_layer(workdir, make_tar(FILES), inflated=False)
    gate = DroppingGate()
    failed: list[bool] = []

    async def main() -> None:
        async with keeping(workdir, gate=gate, read_budget=20) as kept:
            spec = layer.spec(1, workdir / "m")
            await kept.keeper.mount(spec)

            async def read() -> None:
                with pytest.raises(CalledProcessError):
                    await shell(f"cat {spec.target}/b")
                failed.append(True)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await until(lambda: len(gate.ends) >= 2)
                while not failed or kept.keeper.counters(1)["reads_waiting"]:
                    gate.refuse()
                    await trio.sleep(0.01)
            assert gate.refused > 0
            assert kept.keeper.counters(1)["adoptions"] == 1
        for end in gate.ends[1:]:
            end.close()

    trio.run(main)


def test_what_we_do_not_serve_is_refused_as_on_any_file_system(workdir: Path, layer: LazyLayer) -> None:
    """An ioctl, SEEK_DATA, a lock, and a sync: none is passed to a handler, all are answered."""
    code = (
        "import errno, fcntl, os, sys\n"
        "f = open(sys.argv[1], 'rb')\n"
        "try: fcntl.ioctl(f, 0x80045878)\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
        "try: fcntl.ioctl(f, 0x44005801, bytes(1024))\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
        "print(os.lseek(f.fileno(), 0, os.SEEK_DATA))\n"
        "fcntl.flock(f, fcntl.LOCK_SH)\n"
        "try: os.fsync(f.fileno())\n"
        "except OSError as e: print(errno.errorcode[e.errno])\n"
        "print(len(f.read()))\n"
    )

    async def main() -> None:
        async with keeping(workdir) as kept:
            spec = layer.spec(1, workdir / "m")
            await kept.keeper.mount(spec)
            (workdir / "code.py").write_text(code)
            out = (await shell(f"python3 {workdir}/code.py {spec.target}/a")).split()
            assert out == ["ENOTTY", "ENOTTY", "0", "70000"]

    trio.run(main)


def test_a_journal_that_was_lost_is_said_and_replaced(
    workdir: Path, layer: LazyLayer, recovery: str, expected_logs: ExpectedLogs
) -> None:
    if recovery == "relay":
        expected_logs.allow("journal of a mount is lost")
    spec = layer.spec(1, workdir / "m")

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(spec)
            for name in [each for each in kept.holder.kept() if each.endswith(".journal")]:
                kept.holder.drop(name)
        async with keeping(workdir) as kept:
            assert await kept.keeper.restore([spec]) == []
            assert await shell(f"cat {spec.target}/b") == "B"
            assert len(kept.holder.kept()) == (2 if recovery == "relay" else 1)

    trio.run(main)


def test_a_layer_server_has_nothing_to_lose(
    workdir: Path, layer: LazyLayer, recovery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real server at work: its user, capabilities, root, network, environment, and every descriptor."""
    monkeypatch.setenv("DOCKER_CONFIG", "/root/.docker")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(
            name
        )  # whoever measures coverage in the zygote writes its file into the empty root

    async def main() -> None:
        async with keeping(workdir) as kept:
            for number in (1, 2):
                await kept.keeper.mount(layer.spec(number, workdir / f"m{number}"))
                assert await shell(f"cat {workdir}/m{number}/b") == "B"
                await kept.until(number, State.AWAKE)  # it serves before the keeper hears of its start
            first, second = (kept.keeper.mounts[number].pid for number in (1, 2))
            status = _status(first)
            assert status["Uid"].split() == status["Gid"].split() == [str(keeper.SERVER_UID_BASE + 1)] * 4
            assert _status(second)["Uid"] != status["Uid"]
            assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
            assert (status["Groups"], status["NoNewPrivs"]) == ("", "1")
            proc = Path(f"/proc/{first}")
            assert os.listdir(proc / "root") == []
            assert os.readlink(proc / "ns/net") != os.readlink("/proc/self/ns/net")
            environment = (proc / "environ").read_bytes()
            assert b"DOCKER_CONFIG" not in environment
            assert b"secret" not in environment
            descriptors = {fd: os.readlink(proc / "fd" / fd) for fd in os.listdir(proc / "fd")}
            assert sum("journal" in name for name in descriptors.values()) == (
                2 if recovery == "relay" else 0
            )
            for fd, name in descriptors.items():
                if name.startswith(str(workdir)):
                    lines = (proc / "fdinfo" / fd).read_text().splitlines()
                    (flags,) = [line.split()[1] for line in lines if line.startswith("flags:")]
                    assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY, name
                else:
                    kinds = ("/dev/fuse", "/dev/null", "/memfd:soci-", "socket:", "anon_inode:", "pipe:")
                    assert name.startswith(kinds) or int(fd) <= 2, name

    trio.run(main)


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class SilentGate:
    """A fetcher that says nothing until it is told to say no."""

    def __init__(self) -> None:
        self._ends: list[socket.socket] = []

    def connect(self, layer: Digest) -> int | None:
        """Return a new socket."""
        near, far = messages.pair()
        self._ends.append(far)
        return near.detach()

    def say_no(self, spans: int) -> None:
        """Let everybody have an error."""
        for end in self._ends:
            with suppress(OSError):  # of a server that was killed
                for span in range(spans):
                    end.send(wire.encode(wire.Failed(span, errno.EIO)))

    def close(self) -> None:
        """Hang up."""
        for end in self._ends:
            end.close()


def test_readers_that_are_killed_are_gone_at_once(workdir: Path) -> None:
    """Pages are read ahead of who waits for them, and that wait ends with a kill, however long the span takes."""
    layer = make_layer(workdir, make_tar({"a": b"A" * 70_000, "b": b"B" * 70_000}), inflated=False)
    spec = layer.spec(1, workdir / "m")
    mapped = "import mmap, sys; f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[5]"
    gate = SilentGate()

    async def main() -> None:
        async with keeping(workdir, read_budget=600.0, gate=gate) as kept:
            await kept.keeper.mount(spec)
            for name, command in (("a", ["cat"]), ("b", [sys.executable, "-c", mapped])):
                before = kept.keeper.counters(1)["reads_waiting"]
                process = await trio.lowlevel.open_process([*command, f"{spec.target}/{name}"])
                await until(lambda: kept.keeper.counters(1)["reads_waiting"] > before)  # noqa: B023 - called at once
                process.kill()
                with trio.fail_after(60):
                    assert await process.wait() == -signal.SIGKILL
            gate.say_no(3)  # the requests that fetch the pages keep the mount as long as they wait
        gate.close()

    trio.run(main)


def test_a_layer_that_cannot_be_mended_is_tried_all_the_same(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    """A server that is killed before it has opened its files looks as if they were damaged."""
    expected_logs.allow("files of a layer could not be mended")
    tries: list[MountSpec] = []

    async def cannot(spec: MountSpec) -> None:
        tries.append(spec)
        raise ProcessFailed("no fetcher")

    async def main() -> None:
        async with keeping(workdir, mend=cannot) as kept:
            spec = layer.spec(1, workdir / "m")
            mountpoint = await kept.keeper.mount(spec)
            mountpoint.is_damaged = True
            assert await shell(f"cat {spec.target}/b") == "B"
            assert tries == [spec]

    trio.run(main)
