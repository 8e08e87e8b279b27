"""Unpacking one layer as ordinary files, in a process of its own: for layers that no zTOC describes.

    python -m snapshotter.layer.unpack --blob FD --tar FD --lifeline FD --target DIR --compression C --diff-id D [--base]
                                       [--program JSON]

Decompresses the blob into the (temporary, empty) tar file, by a `program` (an array of texts) if it is given one, checks the diffID meanwhile, and writes the files with the
same rules that lazy layers follow (`layer/apply.py`), so that lazy and unpacked layers of one image fit
together. It begins when it is given an empty line on stdin, so that it can be started before. Prints one line of JSON: {"size": bytes, "inodes": n}, or {"error": class, "message": text}.

Without --base there are layers below. They are asked for when this layer has directories without an entry of their
own, which take over what is below them: it prints {"waiting": true}, and is given a line of JSON with the list of the
layers below, nearest first. That may take until those are unpacked.

It runs as root, because it makes devices and owners; it leaves the network first. Foreign bytes are parsed
here, where a crash costs one layer.

It ends when its parent does: the other end of `lifeline`, a pipe, is closed then. What it leaves half done is a
snapshot that was never committed, which the next daemon removes.

Concurrency: one process, one layer; a thread that waits for the end of the parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from snapshotter.errors import DigestMismatch, ProcessFailed, SnapshotterError
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.inherit import Parent, inherited_attributes
from snapshotter.layer.materialize import LayerUsage, materialize, sync
from snapshotter.layer.tree import Tree
from snapshotter.units import Digest, parse_digest
from snapshotter.ztoc.build import read_tar
from snapshotter.ztoc.inflate import decompress_stream

_CHUNK = 1 << 20
_CLONE_NEWNET = 0x40000000


def unpack(
    blob: int,
    tar: int,
    target: Path,
    *,
    compression: str,
    diff_id: Digest,
    parents: Callable[[], list[Parent]] | None,
    program: Sequence[str] = (),
) -> LayerUsage:
    """Unpack the layer in the file `blob` below `target`; `tar` is scratch space. Everything is on disk then.

    `parents` is called when they matter; None stands for the bottom layer. Raises DigestMismatch, InvalidTar,
    UnsupportedLayer, ProcessFailed (of `program`), OSError.
    """
    stream = _output(program, blob) if program else decompress_stream(_chunks(blob), compression)
    ztoc, found = read_tar(_copied(stream, tar))
    if found != diff_id:
        raise DigestMismatch(f"layer unpacks to {found}; the image's config says {diff_id}")
    base = parents is None
    tree = _tree(compile_tree(ztoc, base=base))
    if parents is not None and any(tree.implicit_dirs()):
        inherited = inherited_attributes(tree, parents())
        if inherited:
            tree = _tree(compile_tree(ztoc, base=base, inherited=inherited))
    usage = materialize(tree, tar, target)
    # What is in it would be written to the disk, too, for nobody.
    os.ftruncate(tar, 0)
    sync(target)
    return usage


def main(argv: list[str]) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="unpack")
    for name in ("--blob", "--tar", "--lifeline"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--compression", required=True)
    parser.add_argument("--diff-id", type=parse_digest, required=True)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--program", type=json.loads, default=())
    told = parser.parse_args(argv)
    threading.Thread(target=_end_with_parent, args=(told.lifeline,), daemon=True).start()
    sys.stdin.readline()
    try:
        _leave_network()
        usage = unpack(
            told.blob,
            told.tar,
            told.target,
            compression=told.compression,
            diff_id=told.diff_id,
            parents=None if told.base else _ask_for_parents,
            program=told.program,
        )
    except SnapshotterError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return 1
    except OSError as error:
        print(json.dumps({"error": ProcessFailed.__name__, "message": f"cannot be unpacked: {error}"}))
        return 1
    print(json.dumps({"size": usage.size, "inodes": usage.inodes}))
    return 0


def _ask_for_parents() -> list[Parent]:
    print(json.dumps({"waiting": True}), flush=True)
    rows = json.loads(sys.stdin.readline())
    return [Parent(**{kind: Path(path) for kind, path in row.items()}) for row in rows]


def _end_with_parent(lifeline: int) -> None:
    """Wait for the end of the pipe, and end at once: whoever the result is for is gone."""
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    os._exit(1)


def _leave_network() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


def _chunks(fd: int) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(fd, _CHUNK, offset):
        offset += len(chunk)
        yield chunk


def _output(program: Sequence[str], blob: int) -> Iterator[bytes]:
    """Yield what `program` makes of the blob. Raises ProcessFailed when it fails, OSError when there is none."""
    os.lseek(blob, 0, os.SEEK_SET)  # it reads from where we are
    with subprocess.Popen(program, stdin=blob, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read(_CHUNK):
                yield chunk
        finally:
            process.stdout.close()  # what it has still to say is for nobody: then it ends
    if process.returncode:
        raise ProcessFailed(f"{program[0]} ended with status {process.returncode}")


def _copied(chunks: Iterator[bytes], fd: int) -> Iterator[bytes]:
    for chunk in chunks:
        _write(fd, chunk)
        yield chunk


def _write(fd: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


def _tree(data: bytes) -> Tree:
    fd = os.memfd_create("soci-tree", os.MFD_CLOEXEC)
    try:
        _write(fd, data)
        return Tree(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
