"""The start-up test: mount, adopt and read a tiny layer, before anything is promised to containerd.

Laziness leans on the kernel's protocol, on the right to mount, and on one private name of pyfuse3.
Whether they are there is found out by doing the whole thing once; if it fails, nothing is lazy on this host,
images are pulled in full, and the log and `status` name the reason.

The file is read by a child: nobody who holds a FUSE descriptor may touch a path below its mount.

Concurrency: trio; one at a time. A start does not wait for it, the first pull does.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import trio

from snapshotter.errors import ProcessFailed, SnapshotterError
from snapshotter.fuse import mounting
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import MountSpec
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.spans import SpanFile
from snapshotter.layer.store import LayerPaths, LayerStore
from snapshotter.layer.tree import Tree
from snapshotter.units import Digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm

_log = logging.getLogger(__name__)

SELFTEST_ID = 0
"""A snapshot id that no snapshot has: ids start at 1."""

_CONTENT = b"lazy loading works on this host\n"
_TARGET = "mount"
_TIMEOUT_S = 10.0


async def find_obstacle(keeper: Keeper, directory: Path) -> str:
    """Return why nothing can be lazy here, or the empty string when a lazy file could be read."""
    try:
        await trio.to_thread.run_sync(_clear, directory)
        spec = await trio.to_thread.run_sync(_make_layer, directory)
        mountpoint = await keeper.mount(spec)
    except (SnapshotterError, OSError, ValueError) as error:
        return f"cannot mount: {error}"
    try:
        with trio.fail_after(_TIMEOUT_S):
            result = await trio.run_process(
                ["cat", f"{spec.target}/hello"], capture_stdout=True, capture_stderr=True, check=False
            )
        if result.stdout != _CONTENT:
            return (
                f"a lazy file read wrong: {result.stderr.decode(errors='replace').strip() or 'other content'}"
            )
    except trio.TooSlowError:
        return f"a lazy file could not be read within {_TIMEOUT_S:.0f} s: no layer server adopts its mount"
    except OSError as error:
        return f"cannot read a lazy file: {error}"
    finally:
        with trio.CancelScope(shield=True):
            await keeper.unmount(SELFTEST_ID)
            with trio.move_on_after(_TIMEOUT_S):  # the next test may not find this one's mount
                await mountpoint.gone.wait()
    return ""


def _clear(directory: Path) -> None:
    """Remove what a test left that was interrupted: first its mount, which nobody serves any more."""
    while mounting.detach(str(directory / _TARGET)):
        pass
    shutil.rmtree(directory, ignore_errors=True)


def _make_layer(directory: Path) -> MountSpec:
    """Make a layer of one file whose only span is inflated already."""
    tar = _tar()
    built = build([tar], algorithm=Algorithm.UNCOMPRESSED)
    store = LayerStore(directory)
    digest = built.layer_digest
    paths = store.paths(digest)
    store.write_tree(digest, lambda fd: _write(fd, compile_tree(built.ztoc)))
    _fill(store, paths, digest, tar)
    target = directory / _TARGET
    target.mkdir()
    return MountSpec(SELFTEST_ID, digest, str(target), str(paths.tree), str(paths.data), str(paths.spans))


def _fill(store: LayerStore, paths: LayerPaths, digest: Digest, tar: bytes) -> None:
    with open(paths.tree, "rb") as file:
        tree = Tree(file.fileno())
    data = store.open_cache(paths.data, tree.uncompressed_size)
    spans = SpanFile.create_or_open(paths.spans, tree.span_count, boot_id="", digest=digest)
    try:
        os.pwrite(data, tar[: tree.uncompressed_size], 0)
        for index in range(tree.span_count):
            spans.set_fetched(index)
            spans.set_inflated(index, zlib.crc32(tar))
    finally:
        spans.close()
        os.close(data)
        tree.close()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("hello")
        info.size = len(_CONTENT)
        tar.addfile(info, io.BytesIO(_CONTENT))
    return out.getvalue()


def _write(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise ProcessFailed("the state directory is full")
