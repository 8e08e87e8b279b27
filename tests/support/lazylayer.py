"""A layer on disk as the daemon would have left it, made without a registry: for tests of serving."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from snapshotter.fuse.mountpoint import MountSpec
from snapshotter.layer.compile import compile_files
from snapshotter.layer.spans import SpanFile
from snapshotter.layer.store import LayerPaths, LayerStore
from snapshotter.layer.tree import Tree
from snapshotter.units import Digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True)
class LazyLayer:
    """A layer's digest, files, and the bytes they came from."""

    digest: Digest
    paths: LayerPaths
    tar: bytes
    blob: bytes

    def spec(self, snapshot_id: int, target: Path) -> MountSpec:
        """Return how to mount it at `target`."""
        target.mkdir(parents=True, exist_ok=True)
        paths = self.paths
        return MountSpec(
            snapshot_id, self.digest, str(target), str(paths.tree), str(paths.data), str(paths.spans)
        )


def make_tar(files: dict[str, bytes], *, xattrs: dict[str, str] | None = None) -> bytes:
    """Return a tar of regular files; `xattrs` go to the first of them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, data) in enumerate(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o644, 1_700_000_000
            if xattrs and number == 0:
                info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_layer(root: Path, tar: bytes, *, span_size: int = 1 << 16, inflated: bool = True) -> LazyLayer:
    """Store the layer of `tar` below `root`; with `inflated`, every span is there to be read."""
    blob = gzip.compress(tar, 6, mtime=0)
    built = build([blob], algorithm=Algorithm.GZIP, span_size=span_size)
    store = LayerStore(root)
    digest = built.layer_digest
    paths = store.paths(digest)
    ztoc = store.write_ztoc(digest, built.data)

    def write(out: int) -> None:
        with open(ztoc, "rb") as source:
            compile_files(source.fileno(), out, digest=built.digest)

    store.write_tree(digest, write)
    fill(store, paths, digest, tar if inflated else None)
    return LazyLayer(digest, paths, tar, blob)


def fill(store: LayerStore, paths: LayerPaths, digest: Digest, tar: bytes | None) -> None:
    """Make the cache files; with `tar`, every span inflated."""
    with open(paths.tree, "rb") as file:
        tree = Tree(file.fileno())
    os.close(store.open_cache(paths.blob, tree.compressed_size))
    data = store.open_cache(paths.data, tree.uncompressed_size)
    spans = SpanFile.create_or_open(paths.spans, tree.span_count, boot_id=BOOT_ID, digest=digest)
    if tar is not None:
        os.pwrite(data, tar[: tree.uncompressed_size], 0)
        for index in range(tree.span_count):
            span = tree.span(index)
            spans.set_fetched(index)
            spans.set_inflated(index, zlib.crc32(tar[span.uncompressed_start : span.uncompressed_end]))
    spans.close()
    os.close(data)
    tree.close()
