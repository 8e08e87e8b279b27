"""Keeping real mounts: waking, sleeping, dying, ending."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import sys
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import trio

from snapshotter.fuse import mounting
from snapshotter.fuse.mountpoint import State
from tests.conftest import ExpectedLogs
from tests.support.keeping import Kept, keeping, shell
from tests.support.lazylayer import LazyLayer, make_layer, make_tar
from tests.support.process import is_alive, open_descriptors

pytestmark = pytest.mark.usefixtures("recovery")

_RANDOM = random.Random(5)
FILES = {f"d/f{number:02}": _RANDOM.randbytes(_RANDOM.randrange(1, 150_000)) for number in range(40)}
ALL = hashlib.sha256(b"".join(data for _name, data in sorted(FILES.items()))).hexdigest()


@pytest.fixture
def layer(workdir: Path) -> LazyLayer:
    return make_layer(workdir, make_tar(FILES))


@pytest.fixture
def labelled(workdir: Path) -> LazyLayer:
    return make_layer(workdir / "labelled", make_tar({"a": b"A", "b": b"B"}, xattrs={"user.k": "v"}))


async def digest_of_all(target: Path) -> str:
    return (await shell(f"cat {target}/d/* | sha256sum")).split()[0]


def test_a_layer_reads_as_its_tar(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            assert await digest_of_all(target) == ALL
            listing = (await shell(f"ls -a {target}/d")).split("\n")
            assert listing[:2] == [".", ".."]
            assert listing[2:-1] == sorted(name.removeprefix("d/") for name in FILES)
            assert (await shell(f"stat -c '%a %u %g %s %Y' {target}/d/f00")).split() == [
                "644", "0", "0", str(len(FILES["d/f00"])), "1700000000",
            ]  # fmt: skip

    trio.run(main)


def test_what_needs_no_server_wakes_none(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            for _round in range(2):
                await shell(f"df {target} && stat {target} && echo 3 > /proc/sys/vm/drop_caches")
            assert kept.keeper.mounts[1].state is State.ASLEEP
            assert kept.keeper.counters(1)["adoptions"] == 0
            numbers = (await shell(f"stat -f -c '%b %f %c %l %S' {target}")).split()
            blocks = -(-len(layer.tar[: 2 * 512 * (len(layer.tar) // 1024)]) // 4096)
            assert numbers[1:] == ["0", str(len(FILES)), "255", "4096"]
            assert 0 < int(numbers[0]) <= blocks

    trio.run(main)


def test_fifty_sleeping_mounts_have_no_process(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            for number in range(1, 51):
                await kept.keeper.mount(layer.spec(number, workdir / f"m{number}"))
            await shell(f"df {workdir}/m* && echo 3 > /proc/sys/vm/drop_caches && df {workdir}/m*")
            assert {mount.state for mount in kept.keeper.mounts.values()} == {State.ASLEEP}
            assert sum(kept.keeper.counters(number)["adoptions"] for number in kept.keeper.mounts) == 0
            children = (await shell(f"pgrep -P {kept.forker.pid} || true")).split()
            assert children == []

    trio.run(main)


def test_a_layer_falls_asleep_and_wakes_again(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir, idle_timeout=0.3) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            for _round in range(3):
                await shell("echo 3 > /proc/sys/vm/drop_caches")
                before = kept.keeper.counters(1)["adoptions"]
                assert await digest_of_all(target) == ALL
                # On a busy machine it may have fallen asleep between two reads, too.
                assert kept.keeper.counters(1)["adoptions"] > before
                await kept.until(1, State.ASLEEP)
                assert kept.keeper.mounts[1].pid == 0

    trio.run(main)


def test_a_server_with_no_moment_of_rest_ends_with_its_keeper(workdir: Path, layer: LazyLayer) -> None:
    """As do span arrivals, what the keeper says waits for a burst of requests, not for one of each of pyfuse3's tasks."""
    reader = """
import os, sys
names = [f"{sys.argv[1]}/d/{name}" for name in os.listdir(f"{sys.argv[1]}/d")]
while True:
    for name in names:
        with open(name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.readall()
"""

    def served(numbers: dict[str, int]) -> int:
        return sum(number for name, number in numbers.items() if name.startswith("requests_"))

    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            mountpoint = await kept.keeper.mount(layer.spec(1, target))
            process = await trio.lowlevel.open_process([sys.executable, "-c", reader, str(target)])
            late = []
            for _ in range(5):
                before = served(kept.keeper.counters(1))
                with trio.fail_after(60):
                    while served(kept.keeper.counters(1)) < before + 5_000:
                        await trio.sleep(0.01)
                await kept.until(1, State.AWAKE)  # it serves before the keeper hears of its start
                assert mountpoint.control is not None
                before = served(kept.keeper.counters(1))
                mountpoint.control.shutdown(socket.SHUT_RDWR)
                pidfd = os.pidfd_open(mountpoint.pid)
                await trio.lowlevel.wait_readable(pidfd)
                os.close(pidfd)
                late.append(served(kept.keeper.counters(1)) - before)
            process.kill()
            await process.wait()
            assert sorted(late)[2] < 500, late  # hardly ever one of them: the machine has other things to do

    trio.run(main)


def test_a_cached_layer_is_not_asked(workdir: Path, layer: LazyLayer) -> None:
    """A second `find` and a second read of everything: no LOOKUP, GETATTR, GETXATTR or READ."""

    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            walk = (
                f"find {target} -ls; cat {target}/d/* > /dev/null; ls -lR {target}; test ! -e {target}/nope"
            )
            first = await shell(walk)
            seen = asked(kept)
            assert seen["read"] > 0
            assert seen["lookup"] > 0
            # Read-ahead may still be under way, and whoever drops the page cache drops it for all of the machine.
            with trio.fail_after(60):
                while True:
                    before = asked(kept)
                    assert await shell(walk) == first
                    if asked(kept) == before:
                        break

    def asked(kept: Kept) -> dict[str, int]:
        counters = kept.keeper.counters(1)
        kinds = ("lookup", "getattr", "getxattr", "listxattr", "read", "readlink")
        return {kind: counters[f"requests_{kind}"] for kind in kinds}

    trio.run(main)


def test_an_attribute_that_is_not_there_is_no_error_where_that_is_wanted(
    workdir: Path, layer: LazyLayer
) -> None:
    get = "import os,sys\ntry: print(os.getxattr(sys.argv[1], 'user.k'))\nexcept OSError as e: print(e.errno)"

    async def main() -> None:
        async with keeping(workdir, getxattr_unsupported=False) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            for _round in range(2):
                assert await shell(f'python3 -c "{get}" {target}/d/f00') == "61\n"  # ENODATA
            assert kept.keeper.counters(1)["requests_getxattr"] == 2

    trio.run(main)


def test_getxattr_is_asked_once_where_there_are_none(
    workdir: Path, layer: LazyLayer, labelled: LazyLayer
) -> None:
    get = "import os,sys\ntry: print(os.getxattr(sys.argv[1], 'user.k'))\nexcept OSError as e: print(e.errno)"
    names = "import os,sys; print(os.listxattr(sys.argv[1]))"

    async def main() -> None:
        async with keeping(workdir) as kept:
            plain, with_some = workdir / "plain", workdir / "some"
            await kept.keeper.mount(layer.spec(1, plain))
            await kept.keeper.mount(labelled.spec(2, with_some))
            for _round in range(3):
                assert await shell(f'python3 -c "{get}" {plain}/d/f00') == "95\n"  # ENOTSUP
            assert kept.keeper.counters(1)["requests_getxattr"] == 1
            assert await shell(f'python3 -c "{names}" {plain}/d/f00') == "[]\n"
            assert await shell(f'python3 -c "{get}" {with_some}/a') == "b'v'\n"
            assert await shell(f'python3 -c "{get}" {with_some}/b') == "61\n"  # ENODATA
            assert await shell(f'python3 -c "{names}" {with_some}/a') == "['user.k']\n"

    trio.run(main)


def test_killed_servers_cost_no_read(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            stop = workdir / "stop"
            reader = (
                f"while [ ! -e {stop} ]; do"
                f" echo 3 > /proc/sys/vm/drop_caches; cat {target}/d/* | sha256sum; done"
            )
            results: list[str] = []

            async def read() -> None:
                results.append(await shell(reader, 120))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                former = 0
                for _kill in range(3):
                    with trio.fail_after(60):
                        while (pid := kept.keeper.mounts[1].pid) in {0, former}:
                            await trio.sleep(0.01)
                    await trio.sleep(0.1)  # in the middle of its work
                    os.kill(pid, signal.SIGKILL)
                    former = pid
                stop.touch()
            assert set(results[0].split()[::2]) == {ALL}

    trio.run(main)


def test_a_dead_zygote_is_replaced(workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("zygote ended")

    async def main() -> None:
        async with keeping(workdir, idle_timeout=0.2) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            assert await digest_of_all(target) == ALL
            await kept.until(1, State.ASLEEP)
            former = kept.forker.pid
            assert former is not None
            os.kill(former, signal.SIGKILL)
            with trio.fail_after(60):
                # A request to a zygote that is just dying would fail, and be logged.
                while kept.forker.pid == former:
                    await trio.sleep(0.01)
            await shell("echo 3 > /proc/sys/vm/drop_caches")
            assert await digest_of_all(target) == ALL

    trio.run(main)


def test_an_ended_mount_leaves_nothing(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            before = open_descriptors()
            for _round in range(5):
                await kept.keeper.mount(layer.spec(1, target))
                assert await digest_of_all(target) == ALL
                assert await kept.keeper.unmount(1)
                await kept.until_gone(1)
            assert not await kept.keeper.unmount(1)
            assert open_descriptors() == before
            assert kept.holder.kept() == {}
            assert len(kept.gone) == 5
            assert os.listdir(target) == []

    trio.run(main)


def test_an_unmounted_layer_serves_until_its_last_user_is_gone(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            late = (
                f"exec 3< {target}/d/f01; echo > {workdir}/opened; "
                f"until [ -e {workdir}/read ]; do sleep 0.05; done; sha256sum <&3"
            )
            results: list[str] = []

            async def read() -> None:
                results.append(await shell(late))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                while not (workdir / "opened").exists():
                    await trio.sleep(0.01)
                await kept.keeper.unmount(1)
                await trio.sleep(0.3)
                assert 1 in kept.keeper.mounts
                with pytest.raises(ValueError, match="has not ended yet"):
                    await kept.keeper.mount(layer.spec(1, target))
                (workdir / "read").touch()
            assert results[0].split()[0] == hashlib.sha256(FILES["d/f01"]).hexdigest()
            await kept.until_gone(1)

    trio.run(main)


def test_a_new_daemon_takes_mounts_back_from_the_holder(workdir: Path, layer: LazyLayer) -> None:
    target = workdir / "m"
    spec = layer.spec(1, target)

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(spec)
            assert await digest_of_all(target) == ALL
            await kept.until(1, State.AWAKE)  # it serves before the keeper hears of its start
            old = kept.keeper.mounts[1].pid
        while is_alive(old):
            await trio.sleep(0.01)
        results: list[str] = []

        async def read_while_nobody_serves() -> None:
            results.append(await shell(f"echo 3 > /proc/sys/vm/drop_caches; cat {target}/d/* | sha256sum"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_while_nobody_serves)
            await trio.sleep(0.3)
            assert not results
            async with keeping(workdir) as kept:
                assert await kept.keeper.restore([spec]) == []
                while not results:
                    await trio.sleep(0.01)
                assert kept.keeper.counters(1)["adoptions"] == 1
        assert results[0].split()[0] == ALL

    trio.run(main)


def test_what_the_holder_lost_is_mounted_again(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("dead mount was detached")
    target = workdir / "m"
    spec = layer.spec(1, target)

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(spec)
            os.kill(kept.holder.pid, signal.SIGKILL)
        async with keeping(workdir) as kept:
            assert await kept.keeper.restore([spec]) == []
            assert await digest_of_all(target) == ALL
            assert len(mounting.mounts_below(str(target))) == 1

    trio.run(main)


def test_a_mount_that_no_record_knows_is_let_go(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a mount that nobody knows")

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(layer.spec(1, workdir / "m"))
        async with keeping(workdir) as kept:
            await kept.keeper.restore([])
            assert kept.holder.kept() == {}
            assert mounting.detach(str(workdir / "m"))

    trio.run(main)


def test_a_held_mount_that_cannot_be_served_is_an_error_not_a_hang(
    workdir: Path, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("could not be restored")
    spec = layer.spec(1, workdir / "m")

    async def main() -> None:
        async with keeping(workdir, leave=True) as kept:
            await kept.keeper.mount(spec)
        os.truncate(layer.paths.tree, 10)
        async with keeping(workdir) as kept:
            assert await kept.keeper.restore([spec]) == [spec]
            assert kept.holder.kept() == {}
            assert await shell(f"ls {spec.target}") == ""  # the empty directory below

    trio.run(main)


def test_a_layer_that_is_damaged_does_not_keep_the_others_away(
    workdir: Path, layer: LazyLayer, labelled: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("could not be restored")

    async def main() -> None:
        os.truncate(labelled.paths.tree, 10)
        async with keeping(workdir) as kept:
            specs = [labelled.spec(2, workdir / "bad"), layer.spec(1, workdir / "m")]
            assert await kept.keeper.restore(specs) == specs[:1]
            assert await digest_of_all(workdir / "m") == ALL

    trio.run(main)


def test_a_mount_that_cannot_be_made_leaves_nothing(workdir: Path, layer: LazyLayer) -> None:
    async def main() -> None:
        async with keeping(workdir) as kept:
            spec = layer.spec(1, workdir / "m")
            (workdir / "m").rmdir()
            with pytest.raises(FileNotFoundError):
                await kept.keeper.mount(spec)
            assert not kept.keeper.mounts
            assert kept.holder.kept() == {}

    trio.run(main)


def test_a_span_that_nobody_brings_is_an_error_in_time(workdir: Path) -> None:
    async def main() -> None:
        layer = make_layer(workdir, make_tar({"f": b"x" * 100_000}), inflated=False)
        async with keeping(workdir, read_budget=0.3) as kept:
            target = workdir / "m"
            await kept.keeper.mount(layer.spec(1, target))
            with pytest.raises(CalledProcessError) as raised:
                await shell(f"cat {target}/f")
            assert b"Input/output error" in raised.value.stderr
            assert (await shell(f"ls {target}")) == "f\n"
            assert kept.keeper.counters(1)["failures_read"] >= 1
            with trio.fail_after(60):  # read-ahead may still wait
                while kept.keeper.counters(1)["reads_waiting"]:
                    await trio.sleep(0.01)

    trio.run(main)
