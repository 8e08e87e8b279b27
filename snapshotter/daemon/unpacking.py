"""Local layers: download a whole layer, and have it unpacked by a process of its own.

Owns nothing; the download goes to an unnamed file in the state directory and is gone with its descriptor. The
layer's digest is checked while it arrives, its diffID after it is unpacked.

Concurrency: trio; as many layers at once as containerd prepares.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import trio

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


class Unpacker:
    """Unpacks layers that cannot be lazy."""

    def __init__(self, root: Path, client: RegistryClient, *, inherited_fds: Sequence[int] = ()) -> None:
        self._inherited = tuple(inherited_fds)
        """Files that tell the next daemon which processes of this one are left (`generation.py`)."""
        self._scratch = root / "scratch"
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self._client = client

    async def unpack(
        self, image: Reference, manifest: ImageManifest, layer: Digest, target: Path, parents: list[Parent]
    ) -> Usage:
        """Write the files of `layer` below `target` and return what they occupy.

        Raises RegistryError, CorruptData, UnsupportedLayer, ProcessFailed, OSError.
        """
        descriptor, diff_id = await self._identify(image, manifest, layer)
        compression = layer_compression(descriptor.media_type)
        if compression == "unknown":
            raise UnsupportedLayer(f"layer {layer} has the unknown media type {descriptor.media_type}")
        with (
            tempfile.TemporaryFile(dir=self._scratch) as blob,
            tempfile.TemporaryFile(dir=self._scratch) as tar,
        ):
            async with aclosing(self._client.stream_blob(image, descriptor)) as chunks:
                async for chunk in chunks:
                    await trio.to_thread.run_sync(blob.write, chunk)
            blob.flush()
            try:
                return await self._run(
                    blob.fileno(),
                    tar.fileno(),
                    target,
                    compression=compression,
                    diff_id=diff_id,
                    parents=parents,
                )
            except SnapshotterError as error:
                raise type(error)(f"layer {layer}: {error}") from error

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
        self, blob: int, tar: int, target: Path, *, compression: str, diff_id: Digest, parents: list[Parent]
    ) -> Usage:
        rows = [{"tree": str(p.tree)} if p.tree else {"directory": str(p.directory)} for p in parents]
        command = [
            sys.executable, "-m", "snapshotter.layer.unpack", "--blob", str(blob), "--tar", str(tar),
            "--target", str(target), "--compression", compression, "--diff-id", diff_id,
        ]  # fmt: skip
        lifeline, ours = os.pipe()
        try:
            result = await trio.run_process(
                [*command, "--lifeline", str(lifeline)], stdin=json.dumps(rows).encode(), capture_stdout=True,
                check=False, pass_fds=(blob, tar, lifeline, *self._inherited), env=child_environment(),
            )  # fmt: skip
        finally:
            os.close(lifeline)
            os.close(ours)
        try:
            answer = json.loads(result.stdout)
        except ValueError:
            raise ProcessFailed(
                f"its unpacking ended with status {result.returncode} and no answer"
            ) from None
        if "error" in answer:
            raise _ANSWERS.get(answer["error"], ProcessFailed)(answer["message"])
        return Usage(answer["size"], answer["inodes"])
