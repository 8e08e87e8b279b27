"""An OCI image layout made by another tool, a directory or a tar archive of one, as a source of images.

Read only: nothing is unpacked, an archive's blobs are read where they lie in it. Archives in the older docker-save
form have no index.json and are refused by name.

Concurrency: after construction nothing changes; reads are positional, so any number of threads may read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from snapshotter.errors import CorruptData, InvalidIndex, NotFound, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageIndex, parse
from snapshotter.oci.media_types import OCI_INDEX
from snapshotter.oci.reference import Reference
from snapshotter.soci.content import CHUNK_SIZE, MAX_DOCUMENT_SIZE
from snapshotter.units import Digest, digest_hex

REF_NAME: Final = "org.opencontainers.image.ref.name"
CONTAINERD_NAME: Final = "io.containerd.image.name"


class OciLayout:
    """The blobs and the names of one layout. Use as a context manager: an archive stays open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: int | None = None
        self._members: dict[str, tuple[int, int]] = {}
        """Of an archive: offset and size of each file by its path in the layout."""
        if not path.is_dir():
            self._open_archive()
        self._index = self._read_index()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive. Reads after this raise OSError."""
        if self._archive is not None:
            os.close(self._archive)
            self._archive = None

    @property
    def index(self) -> ImageIndex:
        """The layout's index.json: what the layout names."""
        return self._index

    def image(self, name: str) -> Descriptor:
        """Return what `name` points to: a whole image name, the layout's own name for it, or its tag.

        A layout that holds one image has it under every name. Raises UsageError listing the names there are.
        """
        entries = self._index.manifests
        for wanted in (name, _tag(name)):
            for entry in entries:
                if wanted is not None and wanted in _names(entry):
                    return entry
        if len(entries) == 1:
            return entries[0]
        names = ", ".join(sorted(entry.annotations.get(REF_NAME, str(entry.digest)) for entry in entries))
        raise UsageError(f"image {name}: not in OCI layout {self._path}, which holds {names or 'no image'}")

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound."""
        return self._locate(digest)[2]

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`. Raises NotFound, CorruptData."""
        data = b"".join(self._pieces(digest, start, end))
        if len(data) != end - start:
            raise CorruptData(f"content {digest} in {self._path}: shorter than {end} bytes")
        return data

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole blob in pieces. Raises NotFound."""
        return self._pieces(digest, 0, self.size(digest))

    def _pieces(self, digest: Digest, start: int, end: int) -> Iterator[bytes]:
        path, offset, _ = self._locate(digest)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if self._archive is None else self._archive
        try:
            position, stop = offset + start, offset + end
            while position < stop and (
                piece := os.pread(descriptor, min(CHUNK_SIZE, stop - position), position)
            ):
                position += len(piece)
                yield piece
        finally:
            if self._archive is None:
                os.close(descriptor)

    def _locate(self, digest: Digest) -> tuple[Path, int, int]:
        """Return file, offset and size of a blob. Raises NotFound."""
        name = f"blobs/sha256/{digest_hex(digest)}"
        if self._archive is not None:
            if name in self._members:
                return self._path, *self._members[name]
        else:
            path = self._path / name
            if path.is_file():
                return path, 0, path.stat().st_size
        raise NotFound(f"content {digest}: not in OCI layout {self._path}")

    def _open_archive(self) -> None:
        try:
            with tarfile.open(self._path, "r:") as archive:
                self._members = {
                    member.name.removeprefix("./"): (member.offset_data, member.size)
                    for member in archive
                    if member.isreg()
                }
            self._archive = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"OCI layout {self._path}: no such file or directory") from None
        except (tarfile.TarError, OSError) as error:
            raise UsageError(
                f"OCI layout {self._path}: neither a directory nor a plain tar: {error}"
            ) from None

    def _read_index(self) -> ImageIndex:
        try:
            if self._archive is None:
                data = (self._path / "index.json").read_bytes()
            else:
                offset, size = self._members["index.json"]
                data = os.pread(self._archive, min(size, MAX_DOCUMENT_SIZE), offset)
        except (FileNotFoundError, KeyError):
            self.close()
            hint = "a docker-save archive? " if "manifest.json" in self._members else ""
            raise UsageError(f"OCI layout {self._path}: {hint}it has no index.json") from None
        try:
            document = parse(data, OCI_INDEX)
        except InvalidIndex as error:
            self.close()
            raise InvalidIndex(f"OCI layout {self._path}: index.json: {error}") from None
        if not isinstance(document, ImageIndex):  # pragma: no cover - the media type above rules it out
            raise UsageError(f"OCI layout {self._path}: index.json is not an image index")
        return document


def _names(entry: Descriptor) -> set[str | None]:
    return {entry.annotations.get(CONTAINERD_NAME), entry.annotations.get(REF_NAME)}


def _tag(name: str) -> str | None:
    try:
        return Reference.parse(name).tag
    except UsageError:
        return None
