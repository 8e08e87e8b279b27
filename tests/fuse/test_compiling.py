"""Compiling in a child: what comes out is what compiling gives, and a hostile zTOC costs its child alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from snapshotter import messages
from snapshotter.fuse.compiling import _read_inherited, inherited_memfd
from snapshotter.fuse.forker import Forker
from snapshotter.layer.compile import DirAttributes, compile_tree
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.build import BuiltZtoc, build
from snapshotter.ztoc.model import Algorithm
from tests.support.forking import forking
from tests.support.images import tar
from tests.support.lazylayer import make_tar

UID = 0x6DFF_FFFF
PLENTY = 1 << 30
INHERITED = {
    b"tmp": DirAttributes(0o1777, 1, 2, 1_700_000_000_123_456_789, ((b"user.\xff", b"\x00\xfe"),)),
    b"caf\xe9": DirAttributes(0o755, 0, 0, -1),
}
pytestmark = pytest.mark.usefixtures("root")


def built_of(data: bytes) -> BuiltZtoc:
    return build([data], algorithm=Algorithm.UNCOMPRESSED)


ORDINARY = built_of(make_tar({"a": b"A", "tmp/b": b"B"}))
BOMB = built_of(make_tar({f"{number}/" + "d/" * 1900 + "f": b"" for number in range(300)}))
"""300 entries that imply half a million directories: many seconds and hundreds of megabytes."""


async def compiled(
    forker: Forker,
    data: bytes,
    *,
    digest: Digest | None = None,
    memory: int = PLENTY,
    seconds: int = 30,
    base: bool = False,
    inherited: dict[bytes, DirAttributes] | None = None,
) -> tuple[messages.Message | None, bytes]:
    """Return the child's answer (None: it ended without one) and what it wrote."""
    near, far = messages.pair()
    fds = {"inherited": inherited_memfd(inherited or {})}
    for name, content in (("ztoc", data), ("tree", b"")):
        fds[name] = os.memfd_create(name)
        os.write(fds[name], content)
    arguments = {
        "digest": digest or sha256_digest(data), "base": base,
        "memory_max_bytes": memory, "cpu_max_s": seconds,
    }  # fmt: skip
    with near:
        with far:
            child = await forker.fork(
                "compile", uid=UID, arguments=arguments, fds={**fds, "answer": far.fileno()}
            )
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(child.pidfd)
        os.close(child.pidfd)
        received = messages.receive(near)
    tree = os.pread(fds["tree"], os.fstat(fds["tree"]).st_size, 0)
    for fd in fds.values():
        os.close(fd)
    return (received[0] if received else None), tree


def run(root: Path, data: bytes, **options: object) -> tuple[messages.Message | None, bytes]:
    async def main() -> tuple[messages.Message | None, bytes]:
        async with forking(root) as forker:
            return await compiled(forker, data, **options)  # type: ignore[arg-type]

    return trio.run(main)


def test_what_is_written_is_the_compiled_tree(workdir: Path) -> None:
    answer, tree = run(workdir, ORDINARY.data, inherited=INHERITED)
    assert answer == {"ok": True}
    expected = compile_tree(ORDINARY.ztoc, inherited=INHERITED, ztoc_digest=ORDINARY.digest)
    assert tree == expected != compile_tree(ORDINARY.ztoc, ztoc_digest=ORDINARY.digest)


def test_a_base_layer_is_another_tree(workdir: Path) -> None:
    layer = built_of(tar({"d/a": b"A", "d/.wh.a": b"", "d/.wh.b": b""}))
    _answer, tree = run(workdir, layer.data, base=True)
    assert tree == compile_tree(layer.ztoc, base=True, ztoc_digest=layer.digest)


def test_attributes_travel_whole() -> None:
    fd = inherited_memfd(INHERITED)
    assert _read_inherited(fd) == INHERITED
    os.close(fd)


BAD = [
    (b"", "InvalidZtoc", "is empty"),
    (b"no zTOC at all", "InvalidZtoc", "zTOC"),
    (ORDINARY.data[:-100], "InvalidZtoc", ""),
    (built_of(tar({"a": b"A", ".wh.a": b""})).data, "UnsupportedLayer", "whiteout of a name"),
]


def test_what_cannot_be_compiled_is_said_and_nothing_is_written(workdir: Path) -> None:
    async def main() -> None:
        async with forking(workdir) as forker:
            for data, kind, about in BAD:
                answer, tree = await compiled(forker, data)
                assert answer is not None
                assert answer["error"] == kind
                assert about in answer["message"]
                assert tree == b""

    trio.run(main)


def test_a_ztoc_with_another_digest_is_not_parsed(workdir: Path) -> None:
    answer, tree = run(workdir, ORDINARY.data, digest=sha256_digest(b"another"))
    assert answer is not None
    assert answer["error"] == "DigestMismatch"
    assert tree == b""


def address_space(forker: Forker) -> int:
    """Return the bytes that the zygote has mapped, which every child begins with."""
    status = Path(f"/proc/{forker.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmSize:")[2].split()[0]) << 10


def test_hostile_ztocs_hit_the_limits_of_their_child_and_nothing_else(workdir: Path) -> None:
    async def main() -> None:
        async with forking(workdir) as forker:
            assert (await compiled(forker, ORDINARY.data))[0] == {"ok": True}
            answer, tree = await compiled(
                forker, BOMB.data, memory=address_space(forker) + (8 << 20), seconds=10
            )
            assert tree == b""
            if answer is not None:  # whether it can still say so is luck
                assert answer["error"] == "InvalidZtoc"
                assert "needs more than" in answer["message"]
            assert await compiled(forker, BOMB.data, seconds=1) == (None, b"")
            zygote = forker.pid
            assert (await compiled(forker, ORDINARY.data))[0] == {"ok": True}
            assert forker.pid == zygote

    trio.run(main)
