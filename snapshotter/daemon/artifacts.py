"""A layer's zTOC and its compiled trees: fetched once, compiled once, in a process that may be lost.

A zTOC is trusted because the index of an image names its digest. Two images can share a layer and yet name
different zTOCs for it; the files of a layer belong to the first of them as long as they exist, and the second
image is told so (UnsupportedLayer) instead of being served from a table of contents that its own index does not
vouch for.

Variants: the bottom layer of an image resolves whiteouts differently, and a directory that a layer only
implies takes its attributes from the layers below. Where one of the two matters, the layer gets a tree of its
own for that case (`layer/compile.py`), named by a hash of the case; most layers have just one tree.

Concurrency: trio; one fetch and one compilation per layer and variant at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import trio

from snapshotter import messages
from snapshotter.daemon.flights import Flights
from snapshotter.daemon.localcontent import Artifacts
from snapshotter.daemon.phases import Phase, Phases
from snapshotter.errors import (
    DigestMismatch,
    InvalidLayerFile,
    InvalidZtoc,
    SnapshotterError,
    UnsupportedLayer,
)
from snapshotter.fetch import trace
from snapshotter.fuse.compiling import inherited_memfd
from snapshotter.fuse.forker import Forker
from snapshotter.layer.compile import DirAttributes
from snapshotter.layer.inherit import Parent, inherited_attributes
from snapshotter.layer.layout import TreeFlags
from snapshotter.layer.store import LayerStore
from snapshotter.layer.tree import Tree
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.soci.prefetch import MAX_SIZE as MAX_PREFETCH_SIZE
from snapshotter.soci.prefetch import parse as parse_prefetch
from snapshotter.units import Digest, sha256_digest

_log = logging.getLogger(__name__)

COMPILE_UID = 0x7010_0000
"""Uid of compiling children; above those of layer servers."""

MAX_ZTOC_SIZE = 256 << 20
"""A zTOC has 32 KiB for each 4 MiB of tar and some 200 bytes for each file: this is a layer of 30 GiB."""

_ANSWERS = {kind.__name__: kind for kind in (DigestMismatch, InvalidZtoc, UnsupportedLayer)}
"""What a child may say; it has handled foreign bytes, so that nothing else is taken from it."""

_Inherited = Mapping[bytes, DirAttributes]


@dataclass(frozen=True, slots=True)
class ArtifactLimits:
    """What making the files of one layer may take."""

    memory_max_bytes: int
    """Of compiling."""
    time_max_s: float
    prefetch: bool = False
    """Whether prefetch artifacts are asked for."""


class LayerArtifacts:
    """Makes sure that a layer's zTOC and tree are on disk."""

    def __init__(
        self,
        store: LayerStore,
        artifacts: Artifacts,
        forker: Forker,
        limits: ArtifactLimits,
        nursery: trio.Nursery,
        phases: Phases,
    ) -> None:
        self._phases = phases
        self._store = store
        self._artifacts = artifacts
        self._forker = forker
        self._limits = limits
        self._flights: Flights[Digest] = Flights(nursery)

    async def ensure(
        self, image: Reference, layer: Digest, ztoc: Descriptor, prefetch: Descriptor | None = None
    ) -> None:
        """Return when zTOC and plain tree of `layer` are there, and what is to be fetched first is written down.

        Raises UnsupportedLayer, InvalidZtoc, DigestMismatch, RegistryError, OSError.
        """
        compiled_from = await self._flights.join(layer, lambda: self._ensure(image, layer, ztoc, prefetch))
        if compiled_from != ztoc.digest:  # also when somebody else's flight was joined
            raise UnsupportedLayer(
                f"layer {layer} is on this host with zTOC {compiled_from}, "
                f"and this image's index names {ztoc.digest}"
            )

    async def are_whole(self, layer: Digest, variant: str) -> bool:
        """Return whether zTOC, plain tree and that variant are there, can be used, and belong together. Raises OSError."""
        ztoc = await trio.to_thread.run_sync(self._stored_ztoc, layer)
        trees = [await trio.to_thread.run_sync(self._compiled_from, layer, each) for each in {"", variant}]
        return ztoc is not None and trees.count(ztoc) == len(trees)

    async def variant_for(self, layer: Digest, parents: list[Parent]) -> str:
        """Return the name of the tree that shows `layer` right above `parents` (nearest first), compiled.

        Raises UnsupportedLayer, InvalidZtoc, OSError.
        """
        tree = await trio.to_thread.run_sync(self._open, layer)
        try:
            base = not parents and bool(tree.flags & TreeFlags.HAS_WHITEOUTS)
            inherited: _Inherited = {}
            if parents and tree.flags & TreeFlags.HAS_IMPLICIT_DIRS:
                inherited = await trio.to_thread.run_sync(inherited_attributes, tree, parents)
            ztoc = tree.ztoc_digest
        finally:
            tree.close()
        if not base and not inherited:
            return ""
        variant = _variant_name(base, inherited)
        if await trio.to_thread.run_sync(self._compiled_from, layer, variant) != ztoc:
            await self._flights.join(
                (layer, variant),
                lambda: self._compile(layer, ztoc, variant=variant, base=base, inherited=inherited),
            )
        return variant

    async def _ensure(
        self, image: Reference, layer: Digest, ztoc: Descriptor, prefetch: Descriptor | None
    ) -> Digest:
        """Make what is missing; return the digest of the zTOC to which the layer's files belong."""
        compiled_from = await trio.to_thread.run_sync(self._compiled_from, layer, "")
        if compiled_from not in {None, ztoc.digest}:
            return compiled_from
        stored = await trio.to_thread.run_sync(self._stored_ztoc, layer)
        data: bytes | None = None
        if stored != ztoc.digest:
            if stored is not None and compiled_from is None and self._store.has_tree(layer):
                return stored  # another image's: its tree cannot be read, but its mounts go on
            data = await self._fetch(image, layer, ztoc)
        async with open_nursery() as nursery:  # the disk takes about as long for the zTOC as compiling does
            if data is not None:
                nursery.start_soon(trio.to_thread.run_sync, self._store.write_ztoc, layer, data)
            if compiled_from is None:
                await self._compile(layer, ztoc.digest, data, variant="", base=False, inherited={})
        if prefetch is not None and self._limits.prefetch:
            await self._order(image, layer, prefetch)
        return ztoc.digest

    async def _order(self, image: Reference, layer: Digest, prefetch: Descriptor) -> None:
        """Write down the spans of a prefetch artifact as those that a reader used first, unless a reader has shown it.

        It is a hint: nothing fails for want of it.
        """
        path = self._store.paths(layer).trace
        try:
            if path.exists():
                return
            ranges = parse_prefetch(await self._artifacts.blob(image, prefetch, max_size=MAX_PREFETCH_SIZE))
            tree = await trio.to_thread.run_sync(self._open, layer)
            count = tree.span_count
            tree.close()
            spans = (span for one in ranges for span in range(one.first, min(one.last + 1, count)))
            await trio.to_thread.run_sync(trace.append, path, list(dict.fromkeys(spans)))
        except (SnapshotterError, OSError) as error:
            _log.warning("a prefetch artifact is of no use", extra={"layer": layer, "error": str(error)})

    async def _fetch(self, image: Reference, layer: Digest, ztoc: Descriptor) -> bytes:
        if ztoc.size > MAX_ZTOC_SIZE:
            raise UnsupportedLayer(
                f"zTOC of layer {layer} has {ztoc.size} bytes; the limit is {MAX_ZTOC_SIZE}"
            )
        with self._phases.timed(Phase.ZTOC, layer):
            return await self._artifacts.blob(image, ztoc, max_size=ztoc.size)

    def _open(self, layer: Digest, variant: str = "") -> Tree:
        with open(self._store.paths(layer, variant).tree, "rb") as file:
            return Tree(file.fileno())

    def _compiled_from(self, layer: Digest, variant: str) -> Digest | None:
        """Return the digest of the zTOC that a tree was made from, None where there is no usable tree."""
        try:
            tree = self._open(layer, variant)
        except FileNotFoundError:
            return None
        except InvalidLayerFile as error:
            _log.info("tree is made again", extra={"layer": layer, "variant": variant, "reason": str(error)})
            return None
        try:
            return tree.ztoc_digest
        finally:
            tree.close()

    def _stored_ztoc(self, layer: Digest) -> Digest | None:
        """Return the digest that the stored zTOC really has, None where there is none."""
        try:
            return sha256_digest(self._store.paths(layer).ztoc.read_bytes())
        except FileNotFoundError:
            return None

    async def _compile(
        self,
        layer: Digest,
        ztoc: Digest,
        data: bytes | None = None,
        *,
        variant: str,
        base: bool,
        inherited: _Inherited,
    ) -> Digest:
        """Have a child compile the tree; what it writes gets its name only if the child says that all is well.

        `data` is the zTOC while it is not stored yet. Returns `ztoc`, from which it is made.
        """
        started = trio.current_time()

        def write(fd: int) -> None:
            source = self._open_ztoc(layer, data)
            try:
                trio.from_thread.run(self._run_child, layer, ztoc, source, fd, base, inherited)
            finally:
                os.close(source)

        with self._phases.timed(Phase.COMPILE, layer):
            await trio.to_thread.run_sync(self._store.write_tree, layer, write, variant)
        _log.info(
            "tree compiled",
            extra={"layer": layer, "variant": variant, "seconds": round(trio.current_time() - started, 3)},
        )
        return ztoc

    def _open_ztoc(self, layer: Digest, data: bytes | None) -> int:
        if data is None:
            return os.open(self._store.paths(layer).ztoc, os.O_RDONLY | os.O_CLOEXEC)
        fd = os.memfd_create("soci-ztoc", os.MFD_CLOEXEC)
        with open(fd, "wb", buffering=0, closefd=False) as file:
            file.write(data)
        return fd

    async def _run_child(
        self, layer: Digest, ztoc: Digest, source: int, out: int, base: bool, inherited: _Inherited
    ) -> None:
        near, far = messages.pair()
        with near:
            with far, ExitStack() as opened:
                inherited_fd = inherited_memfd(inherited)
                opened.callback(os.close, inherited_fd)
                child = await self._forker.fork(
                    "compile",
                    uid=COMPILE_UID,
                    arguments={
                        "digest": ztoc,
                        "base": base,
                        "memory_max_bytes": self._limits.memory_max_bytes,
                        "cpu_max_s": self._limits.time_max_s,
                    },
                    fds={"ztoc": source, "tree": out, "answer": far.fileno(), "inherited": inherited_fd},
                )
            try:
                with trio.move_on_after(self._limits.time_max_s * 2):
                    await trio.lowlevel.wait_readable(near)
                near.setblocking(False)
                _raise_unless_ok(layer, _answer(near))
            finally:
                with suppress(ProcessLookupError):  # it has ended, as it should
                    signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
                os.close(child.pidfd)


def _answer(near: socket.socket) -> messages.Message | None:
    try:
        received = messages.receive(near)
    except BlockingIOError:
        return None
    return received[0] if received is not None else None


def _raise_unless_ok(layer: Digest, answer: messages.Message | None) -> None:
    if answer is None:
        raise InvalidZtoc(f"zTOC of layer {layer}: compiling it went over its limits of memory or time")
    if "error" in answer:
        kind = _ANSWERS.get(str(answer["error"]), InvalidZtoc)
        raise kind(f"layer {layer}: {answer.get('message')}")


def _variant_name(base: bool, inherited: _Inherited) -> str:
    rows = [[path.hex(), *_plain(attributes)] for path, attributes in sorted(inherited.items())]
    return ("base-" if base else "") + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _plain(each: DirAttributes) -> list[object]:
    xattrs = [[name.hex(), value.hex()] for name, value in each.xattrs]
    return [each.mode, each.uid, each.gid, each.mtime_ns, xattrs]
