"""Compiling a zTOC into a tree in a child of the zygote: foreign bytes are parsed where it costs nothing.

The child has limits on memory and processor time, sees no file but the two it was given, and answers on a
socket with one message: {"ok": true, …} or {"error": class name, "message": text}. A child that ends
without a word was killed by its limits: CPython without any memory left may not even get out of a `with`
block, and turns there until its processor time is used up.

Concurrency: one process, one compilation.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
from collections.abc import Mapping
from typing import Any

from snapshotter import errors, messages
from snapshotter.layer.compile import DirAttributes, compile_files
from snapshotter.units import parse_digest

DESCRIPTORS = ("ztoc", "tree", "answer", "inherited")
"""What the job is given: the zTOC to read, the file to write, the socket to answer on, directory attributes."""

_LAST_WORDS_BYTES = 16 << 20
"""What a child whose memory is used up gets on top, to be able to say so."""


def compile_job(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    """Compile one tree: arguments `digest`, `base`, `memory_max_bytes`, `cpu_max_s`."""
    memory = arguments["memory_max_bytes"]
    most = memory + _LAST_WORDS_BYTES
    last = (most, most)  # made now: when it is needed, not even a number can be made
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    seconds = math.ceil(arguments["cpu_max_s"])  # never 0, which ends the child before it begins
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    answer = socket.socket(fileno=fds["answer"])
    try:
        compile_files(
            fds["ztoc"],
            fds["tree"],
            digest=parse_digest(arguments["digest"]),
            base=arguments["base"],
            inherited=_read_inherited(fds["inherited"]),
        )
    except errors.SnapshotterError as error:
        messages.send(answer, {"error": type(error).__name__, "message": str(error)[:4096]})
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, last)
        messages.send(answer, {"error": "InvalidZtoc", "message": f"the zTOC needs more than {memory} bytes"})
    else:
        messages.send(answer, {"ok": True})


def inherited_memfd(inherited: Mapping[bytes, DirAttributes]) -> int:
    """Return a new descriptor that carries directory attributes to a child; bytes travel as latin-1 text."""
    rows = [
        [
            path.decode("latin-1"), each.mode, each.uid, each.gid, each.mtime_ns,
            [[name.decode("latin-1"), value.decode("latin-1")] for name, value in each.xattrs],
        ]
        for path, each in sorted(inherited.items())
    ]  # fmt: skip
    fd = os.memfd_create("soci-inherited", os.MFD_CLOEXEC)
    with open(fd, "w", encoding="ascii", closefd=False) as file:
        json.dump(rows, file)
    return fd


def _read_inherited(fd: int) -> dict[bytes, DirAttributes]:
    rows = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    return {
        path.encode("latin-1"): DirAttributes(
            mode, uid, gid, mtime_ns, tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in xattrs)
        )
        for path, mode, uid, gid, mtime_ns, xattrs in rows
    }
