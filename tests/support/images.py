"""Images from plain Python values: tar, compressed layer, OCI layout.

It is written with the standard library alone and shares nothing with the code under test, so that it can
stand as the oracle: what goes in here must come out of a mount. The same values give the same bytes and
digests at every run.

Concurrency: plain functions and values.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import zstandard

MTIME = 1_700_000_000
"""Modification time of every entry that names none."""

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_SUFFIXES = {"gzip": "+gzip", "members": "+gzip", "zstd": "+zstd", "uncompressed": ""}
_COPY_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tar entry; the functions below make the usual kinds."""

    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = MTIME
    target: str = ""
    major: int = 0
    minor: int = 0
    pax: Mapping[str, str] = field(default_factory=dict)


def directory(mode: int = 0o755, **attributes: Any) -> Entry:
    """Return a directory entry."""
    return Entry(type=tarfile.DIRTYPE, mode=mode, **attributes)


def symlink(target: str, **attributes: Any) -> Entry:
    """Return a symbolic link to `target`."""
    return Entry(type=tarfile.SYMTYPE, mode=0o777, target=target, **attributes)


def hardlink(target: str, **attributes: Any) -> Entry:
    """Return a hard link to the earlier entry `target`."""
    return Entry(type=tarfile.LNKTYPE, target=target, **attributes)


def tar(entries: Mapping[str, Entry | bytes] | Iterable[tuple[str, Entry | bytes]]) -> bytes:
    """Return a PAX tar of `entries`, in their order; pairs may repeat a name. Bytes stand for a plain file."""
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name, value in pairs:
            entry = Entry(value) if isinstance(value, bytes) else value
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname = entry.type, entry.mode, entry.target
            info.uid, info.gid, info.mtime = entry.uid, entry.gid, entry.mtime
            info.devmajor, info.devminor = entry.major, entry.minor
            info.pax_headers = dict(entry.pax)
            info.size = len(entry.data)
            archive.addfile(info, io.BytesIO(entry.data))
    return stream.getvalue()


def compress(data: bytes, compression: str, level: int = 6) -> bytes:
    """Return `data` as "gzip", "members" (one gzip member per MiB), "zstd" or "uncompressed"."""
    match compression:
        case "gzip":
            return gzip.compress(data, level, mtime=0)
        case "members":
            pieces = (data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20))
            return b"".join(gzip.compress(piece, level, mtime=0) for piece in pieces)
        case "zstd":
            return zstandard.ZstdCompressor(level=level).compress(data)
        case "uncompressed":
            return data
    raise ValueError(f"no such compression: {compression}")


def sha256(data: bytes) -> str:
    """Return the OCI digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A layer as it is stored: in memory, or in a file when it is large."""

    media_type: str
    digest: str
    diff_id: str
    size: int
    content: bytes | Path

    def copy_to(self, target: Path) -> None:
        """Write the blob to `target`."""
        if isinstance(self.content, Path):
            shutil.copyfile(self.content, target)
        else:
            target.write_bytes(self.content)

    def descriptor(self) -> dict[str, Any]:
        """Return the layer's OCI descriptor."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


def layer(
    entries: Mapping[str, Entry | bytes] | Iterable[tuple[str, Entry | bytes]],
    *,
    compression: str = "gzip",
    level: int = 6,
) -> LayerBlob:
    """Return a layer that holds `entries` (see `tar` and `compress`)."""
    return tar_layer(tar(entries), compression=compression, level=level)


def tar_layer(data: bytes, *, compression: str = "gzip", level: int = 6) -> LayerBlob:
    """Return a layer of the ready tar `data`."""
    blob = compress(data, compression, level)
    return LayerBlob(_LAYER_TYPE + _SUFFIXES[compression], sha256(blob), sha256(data), len(blob), blob)


def gzip_file_layer(path: Path) -> LayerBlob:
    """Return the layer whose gzip blob is the file `path`, as it is; the file must stay."""
    digest, diff_id = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as raw:
        while chunk := raw.read(_COPY_CHUNK):
            digest.update(chunk)
    with gzip.open(path, "rb") as unpacked:
        while chunk := unpacked.read(_COPY_CHUNK):
            diff_id.update(chunk)
    size = path.stat().st_size
    media_type = _LAYER_TYPE + _SUFFIXES["gzip"]
    return LayerBlob(media_type, f"sha256:{digest.hexdigest()}", f"sha256:{diff_id.hexdigest()}", size, path)


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an OCI layout; `source` is how skopeo names it."""

    layout: Path
    tag: str
    digest: str
    layers: tuple[LayerBlob, ...]

    @property
    def source(self) -> str:
        """The image in skopeo's words."""
        return f"oci:{self.layout}:{self.tag}"

    @property
    def size(self) -> int:
        """Compressed bytes of all layers."""
        return sum(blob.size for blob in self.layers)


class ImageBuilder:
    """Collects layers and writes them as an image: `ImageBuilder(layout).layer({...}).build()`."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self._layers: list[LayerBlob] = []
        self._config: dict[str, Any] = {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "Cmd": ["/bin/sh"]}

    def layer(
        self,
        entries: Mapping[str, Entry | bytes] | Iterable[tuple[str, Entry | bytes]],
        *,
        compression: str = "gzip",
        level: int = 6,
    ) -> Self:
        """Add a layer of `entries` on top."""
        return self.add(layer(entries, compression=compression, level=level))

    def add(self, *blobs: LayerBlob) -> Self:
        """Add ready layers on top."""
        self._layers += blobs
        return self

    def config(self, **values: Any) -> Self:
        """Set keys of the image's run configuration, say `Volumes={"/data": {}}`."""
        self._config.update(values)
        return self

    def build(self, tag: str = "latest") -> Image:
        """Write everything into the layout and return the image; an image of that tag is replaced."""
        blobs = self.layout / "blobs/sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        for blob in self._layers:
            target = blobs / blob.digest.removeprefix("sha256:")
            if not target.exists():
                blob.copy_to(target)
        host = host_platform()
        config = _put(
            blobs,
            {
                **host,
                "config": self._config,
                "rootfs": {"type": "layers", "diff_ids": [blob.diff_id for blob in self._layers]},
            },
        )
        manifest = _put(
            blobs,
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST_TYPE,
                "config": {"mediaType": _CONFIG_TYPE, **config},
                "layers": [blob.descriptor() for blob in self._layers],
            },
        )
        annotations = {"org.opencontainers.image.ref.name": tag}
        entry = {"mediaType": _MANIFEST_TYPE, **manifest, "platform": host, "annotations": annotations}
        _add_to_index(self.layout, entry, tag)
        return Image(self.layout, tag, manifest["digest"], tuple(self._layers))


def host_platform() -> dict[str, str]:
    """Return this machine's platform in OCI's words."""
    machine = platform.machine()
    return {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine), "os": "linux"}


def _put(blobs: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    data = json.dumps(value, separators=(",", ":")).encode()
    digest = sha256(data)
    (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    return {"digest": digest, "size": len(data)}


def _add_to_index(layout: Path, entry: Mapping[str, Any], tag: str) -> None:
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    index = layout / "index.json"
    listed: Sequence[Mapping[str, Any]] = json.loads(index.read_text())["manifests"] if index.exists() else []
    others = [
        one for one in listed if one.get("annotations", {}).get("org.opencontainers.image.ref.name") != tag
    ]
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*others, entry]}))
