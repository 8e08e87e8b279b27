"""Local layers: download a whole layer, and have it unpacked by a process of its own.

Owns nothing; the download goes to an unnamed file in the state directory and is gone with its descriptor. The
layer's digest is checked while it arrives, its diffID while it is unpacked.

Concurrency: trio; as many layers at once as are asked for.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from snapshotter.download.downloads import DEFAULT_LIMITS, Downloads, Limits
from snapshotter.download.files import FileStore
from snapshotter.environment import child_environment
from snapshotter.errors import (
    DigestMismatch,
    InvalidIndex,
    InvalidLayerFile,
    InvalidTar,
    ProcessFailed,
    SnapshotterError,
    UnsupportedLayer,
)
from snapshotter.layer.inherit import Parent
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import MAX_CONFIG_SIZE, ImageManifest, parse_config
from snapshotter.oci.media_types import layer_compression
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.snapshot.model import Usage
from snapshotter.units import Digest

_ANSWERS: dict[str, type[SnapshotterError]] = {
    kind.__name__: kind for kind in (DigestMismatch, InvalidLayerFile, InvalidTar, UnsupportedLayer)
}
"""What the process may say; anything else is its own failure."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer and what its image says it unpacks to."""

    descriptor: Descriptor
    diff_id: Digest
    is_base: bool
    """It is the bottom layer."""

    @property
    def compression(self) -> str:
        """How it is compressed. Raises UnsupportedLayer."""
        compression = layer_compression(self.descriptor.media_type)
        if compression == "unknown":
            raise UnsupportedLayer(
                f"layer {self.descriptor.digest} has the unknown media type {self.descriptor.media_type}"
            )
        return compression


class Unpacker:
    """Unpacks layers that cannot be lazy."""

    def __init__(
        self,
        root: Path,
        client: RegistryClient,
        *,
        limits: Limits = DEFAULT_LIMITS,
        inherited_fds: Sequence[int] = (),
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._programs = programs or {}
        """Commands that decompress, in our place, by compression."""
        self._inherited = tuple(inherited_fds)
        """Files that tell the next daemon which processes of this one are left (`generation.py`)."""
        self.scratch = root / "scratch"
        self.scratch.mkdir(mode=0o700, exist_ok=True)
        self._client = client
        self._limits = limits

    async def unpack(
        self, image: Reference, manifest: ImageManifest, layer: Digest, target: Path, parents: list[Parent]
    ) -> Usage:
        """Write the files of `layer` below `target` and return what they occupy.

        Raises RegistryError, CorruptData, UnsupportedLayer, ProcessFailed, OSError.
        """
        descriptor, diff_id = await self._identify(image, manifest, layer)
        packed = PackedLayer(descriptor, diff_id, is_base=not parents)
        _ = packed.compression  # what cannot be unpacked is not downloaded

        async def those() -> list[Parent]:
            return parents

        with closing(FileStore(self.scratch)) as store:
            await self._download(image, descriptor, store)
            with store.take(layer) as blob:
                return await self.run(blob.fileno(), packed, target, those)

    async def run(
        self,
        blob: int,
        layer: PackedLayer,
        target: Path,
        parents: Callable[[], Awaitable[list[Parent]]],
        begin: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> Usage:
        """Unpack the layer in the file `blob`, whose digest is its own; `parents` is called when they matter.

        The work begins when `begin` returns; until then only the process starts.

        Raises CorruptData, UnsupportedLayer, ProcessFailed, OSError.
        """
        lifeline, ours = os.pipe()
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as tar:
                fds = (blob, tar.fileno(), lifeline)
                command = [
                    sys.executable, "-m", "snapshotter.layer.unpack", "--blob", str(blob), "--tar", str(tar.fileno()),
                    "--lifeline", str(lifeline), "--target", str(target), "--compression", layer.compression,
                    "--diff-id", layer.diff_id, *(["--base"] if layer.is_base else []),
                ]  # fmt: skip
                if program := self._programs.get(layer.compression):
                    command += ["--program", json.dumps(program)]
                return await self._run(command, fds, parents, begin)
        except SnapshotterError as error:
            raise type(error)(f"layer {layer.descriptor.digest}: {error}") from error
        finally:
            os.close(lifeline)
            os.close(ours)

    async def _download(self, image: Reference, layer: Descriptor, store: FileStore) -> None:
        downloads = Downloads(image, self._client, store, limits=self._limits)
        with closing(downloads):
            async with open_nursery() as nursery:
                downloads.start([layer], nursery)
                await downloads.wait(layer.digest)

    async def _identify(
        self, image: Reference, manifest: ImageManifest, layer: Digest
    ) -> tuple[Descriptor, Digest]:
        """Return the layer's descriptor, and its diffID from the image's config."""
        positions = [i for i, each in enumerate(manifest.layers) if each.digest == layer]
        if not positions:
            raise InvalidIndex(f"{image} has no layer {layer}")
        config = parse_config(await self._client.blob(image, manifest.config, max_size=MAX_CONFIG_SIZE))
        if len(config.diff_ids) != len(manifest.layers):
            raise InvalidIndex(
                f"{image} has {len(manifest.layers)} layers and {len(config.diff_ids)} diffIDs in its config"
            )
        return manifest.layers[positions[0]], config.diff_ids[positions[0]]

    async def _run(
        self,
        command: list[str],
        fds: tuple[int, ...],
        parents: Callable[[], Awaitable[list[Parent]]],
        begin: Callable[[], Awaitable[None]],
    ) -> Usage:
        async with open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                functools.partial(
                    trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False,
                    pass_fds=(*fds, *self._inherited), env=child_environment(),
                )
            )  # fmt: skip
            await begin()
            answer = await _converse(process, parents)
        if answer is None:
            raise ProcessFailed(f"its unpacking ended with status {process.returncode} and no answer")
        if "error" in answer:
            raise _ANSWERS.get(answer["error"], ProcessFailed)(answer["message"])
        return Usage(answer["size"], answer["inodes"])


async def _converse(
    process: trio.Process, parents: Callable[[], Awaitable[list[Parent]]]
) -> dict[str, Any] | None:
    """Return the process's last word, None for none; meanwhile it may ask for the layers below."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(trio.BrokenResourceError):  # it has died, which its end will show
        await process.stdin.send_all(b"\n")
    said = b""
    async for data in process.stdout:
        said += data
        if _parsed(said) == {"waiting": True}:
            said = b""
            rows = [
                {"tree": str(p.tree)} if p.tree else {"directory": str(p.directory)} for p in await parents()
            ]
            with suppress(trio.BrokenResourceError):
                await process.stdin.send_all(json.dumps(rows).encode() + b"\n")
    return _parsed(said)


def _parsed(said: bytes) -> dict[str, Any] | None:
    """Return what a process said, None when that is not, or not yet, a line of JSON."""
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        return None
    return answer
