"""Where the files of the layers are: one directory per layer digest, shared by every image of the host.

    <root>/layers/sha256/<hex>/
        ztoc            the layer's zTOC, verbatim
        tree            compiled from it (`layer/compile.py`); `tree.<variant>` where parent layers matter
        blob            sparse copy of the compressed layer
        data            sparse copy of the tar stream; of an uncompressed layer another name of `blob`
        spans           what of the two is there (`layer/spans.py`)
        trace           order of first use

Names appear only whole: `write_*` writes a temporary beside its target, syncs it, renames it and syncs the
directory, so that after a crash a name means the complete old or the complete new file. Temporaries of a
process that died are removed when the store is opened. Directories are 0700 and files 0600: layers may hold
what no other user of the host may see.

Concurrency: no state but the root; any thread of any process may call it, except that only the daemon opens a
store with `tidy=True` and removes layers. It deliberately does not decide what is kept, and never looks into a file.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotter.errors import InvalidLayerFile
from snapshotter.units import Digest, digest_hex, parse_digest

_TEMPORARY: Final = ".tmp-"
_VARIANT: Final = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")


@dataclass(frozen=True, slots=True)
class LayerPaths:
    """The files of one layer; whether they exist is another matter."""

    directory: Path
    ztoc: Path
    tree: Path
    blob: Path
    data: Path
    spans: Path
    trace: Path


class LayerStore:
    """The layers below `root`, the daemon's state directory.

    The directory is made when it is missing; with `tidy` (the daemon at its start) leftovers of interrupted
    writes are removed.
    """

    def __init__(self, root: Path, *, tidy: bool = False) -> None:
        self._layers = root / "layers" / "sha256"
        self._layers.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._layers.parent.chmod(0o700)
        if tidy:
            self._remove_leftovers()

    def paths(self, digest: Digest, variant: str = "") -> LayerPaths:
        """Return where the files of `digest` are; `variant` names one of its trees.

        Raises ValueError when either is not well formed (a path is made of them).
        """
        directory = self._layers / digest_hex(parse_digest(digest))
        if variant and _VARIANT.fullmatch(variant) is None:
            raise ValueError(f"not the name of a tree variant: {variant!r}")
        return LayerPaths(
            directory=directory,
            ztoc=directory / "ztoc",
            tree=directory / (f"tree.{variant}" if variant else "tree"),
            blob=directory / "blob",
            data=directory / "data",
            spans=directory / "spans",
            trace=directory / "trace",
        )

    def has_ztoc(self, digest: Digest) -> bool:
        """Return whether the layer's zTOC is stored."""
        return self.paths(digest).ztoc.exists()

    def has_tree(self, digest: Digest, variant: str = "") -> bool:
        """Return whether that tree is stored; only opening it tells whether this version can read it."""
        return self.paths(digest, variant).tree.exists()

    def layers(self) -> list[Digest]:
        """Return every layer that has a directory, in the order of the digests."""
        found = []
        for name in sorted(os.listdir(self._layers)):
            with suppress(ValueError):
                found.append(parse_digest(f"sha256:{name}"))
        return found

    def write_ztoc(self, digest: Digest, data: bytes) -> Path:
        """Store the zTOC of layer `digest` (the caller has checked the zTOC's own digest); return its path."""
        return self._write(self.paths(digest).ztoc, lambda fd: _write_all(fd, data))

    def write_tree(self, digest: Digest, write: Callable[[int], None], variant: str = "") -> Path:
        """Store a tree that `write` writes to the descriptor it is given; return its path.

        Nothing is stored when `write` raises.
        """
        return self._write(self.paths(digest, variant).tree, write)

    def open_cache(self, path: Path, size: int) -> int:
        """Open `blob` or `data` for reading and writing, made sparse and of `size` bytes when it is missing.

        Returns a descriptor. Raises OSError; InvalidLayerFile when the file system cannot hold sparse files.
        """
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            had = os.fstat(fd).st_size
            if had != size:
                os.ftruncate(fd, size)
            if had == 0:
                _refuse_without_holes(fd, path, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def share_cache(self, blob: Path, data: Path) -> bool:
        """Make `blob` and `data`, of which one exists, names of one file, for a layer that is its own tar stream.

        Returns whether they are: a file that an older version has made stays, for servers may be reading it. Raises
        OSError.
        """
        for name, other in ((blob, data), (data, blob)):
            with suppress(FileExistsError, FileNotFoundError):
                os.link(name, other)
        return blob.samefile(data)

    def usage(self, digest: Digest) -> tuple[int, int]:
        """Return the disk space in bytes and the inodes that a layer's files occupy, the directory included."""
        directory = self.paths(digest).directory
        found: dict[int, int] = {}
        with suppress(FileNotFoundError):  # it is being removed
            for path in (directory, *directory.iterdir()):
                with suppress(FileNotFoundError):  # a temporary, which has its name by now
                    status = path.stat()
                    found[status.st_ino] = status.st_blocks * 512
        return sum(found.values()), len(found)

    def remove(self, digest: Digest) -> None:
        """Remove every file of the layer. Who has them open keeps them until they are closed.

        The directory first loses its name, so that a crash in between leaves a leftover, never half a layer.
        """
        doomed = self._layers / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            self.paths(digest).directory.rename(doomed)
            shutil.rmtree(doomed)

    def _write(self, target: Path, write: Callable[[int], None]) -> Path:
        made = not target.parent.exists()
        target.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = target.parent / f"{_TEMPORARY}{target.name}-{secrets.token_hex(8)}"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write(fd)
            os.fsync(fd)
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        _sync_directory(target.parent)
        if made:
            _sync_directory(self._layers)
        return target

    def _remove_leftovers(self) -> None:
        for leftover in [*self._layers.glob(f"{_TEMPORARY}*"), *self._layers.glob(f"*/{_TEMPORARY}*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refuse_without_holes(fd: int, path: Path, size: int) -> None:
    """Raise InvalidLayerFile when an empty file of `size` bytes occupies about that much."""
    allocated = os.fstat(fd).st_blocks * 512
    if size >= 1 << 20 and allocated >= size:
        os.ftruncate(fd, 0)
        raise InvalidLayerFile(
            f"{path}: the file system stores no sparse files; put the state directory on ext4, xfs or btrfs"
        )
