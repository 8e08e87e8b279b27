"""`soci index` and `soci ztoc`: what they list, show, read and remove."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from snapshotter.cli.output import age
from snapshotter.containerd.client import Containerd
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.artifacts import ArtifactDatabase, IndexRow
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest, sha256_digest
from tests.cli.conftest import Soci
from tests.soci.images import noise
from tests.support.images import Image, ImageBuilder, directory, symlink

NAME = "registry.example/app:1"
FILES = {"dir/": directory(), "dir/big": noise(200_000, seed=3), "empty": b"", "link": symlink("dir/big")}


@pytest.fixture
def image(tmp_path: Path, soci: Soci) -> Image:
    """An image in a layout, indexed; its artifacts in the soci store."""
    image = ImageBuilder(tmp_path / "image").layer(FILES).layer({"top": os.urandom(100)}).build()
    soci(
        *("create", "--min-layer-size", "0", "--span-size", "65536", "--build-tool-identifier", "tool"),
        *("--oci-layout", image.layout, NAME),
    )
    soci.options += ["--content-store", "soci"]
    return image


def index_row(soci: Soci) -> IndexRow:
    return ArtifactDatabase(soci.root).indices()[0]


def ztoc_of(soci: Soci, image: Image, layer: int) -> Digest:
    (row,) = ArtifactDatabase(soci.root).ztocs(layer_digest=Digest(image.layers[layer].digest))
    return row.digest


def name_in_containerd(containerd: Containerd, image: Image, name: str) -> None:
    manifest = (image.layout / "blobs/sha256" / image.digest.removeprefix("sha256:")).read_bytes()
    media_type = "application/vnd.oci.image.manifest.v1+json"
    containerd.images.put(name, Descriptor(media_type, Digest(image.digest), len(manifest)))


def test_index_ls_has_the_field_s_columns(soci: Soci, image: Image, containerd: Containerd) -> None:
    row = index_row(soci)
    header, line = soci("index", "ls").out.splitlines()
    assert header.split("    ")[0] == "DIGEST"
    names = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"]
    starts = [header.index(name) for name in names]
    assert starts == sorted(starts)
    cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert cells[:2] == [row.digest, str(row.size)]
    assert cells[2:6] == ["", "linux/amd64", "application/vnd.oci.image.manifest.v1+json", "v1"]
    assert cells[6].endswith("s ago")
    for name in ("registry.example/a:1", "registry.example/b:1"):
        name_in_containerd(containerd, image, name)
    lines = soci("index", "list").out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["registry.example/a:1", "registry.example/b:1"]


def test_index_ls_without_containerd(soci: Soci, image: Image) -> None:
    out = soci("--address", "/nowhere", "index", "ls").out
    assert index_row(soci).digest in out


def test_index_ls_filters(soci: Soci, image: Image, containerd: Containerd) -> None:
    name_in_containerd(containerd, image, NAME)
    digest = index_row(soci).digest
    assert soci("index", "ls", "-q").out.split() == [digest]
    assert soci("index", "ls", "-q", "--ref", NAME, "--platform", "linux/amd64").out.split() == [digest]
    assert soci("index", "ls", "-q", "-p", "linux/arm64").out == ""
    assert "registry.example/other:1" in soci.fails("index", "ls", "--ref", "registry.example/other:1")


def test_index_info_prints_the_manifest(soci: Soci, image: Image) -> None:
    row = index_row(soci)
    out = soci("index", "info", row.digest).out
    stored = (soci.root / "content/blobs/sha256" / row.digest.removeprefix("sha256:")).read_bytes()
    assert json.loads(out) == json.loads(stored)
    assert out.startswith('{\n  "schemaVersion": 2,\n')
    ztoc = ztoc_of(soci, image, 0)
    assert soci.fails("index", "info", ztoc) == f"{ztoc} is a zTOC and not a SOCI index: see `soci ztoc info`"
    assert "not a sha256 digest" in soci.fails("index", "info", "sha256:12")
    unknown = sha256_digest(b"unknown")
    assert soci.fails("index", "info", unknown).startswith(f"SOCI index {unknown}: not known here")


def test_index_rm_by_digest_and_by_image(soci: Soci, image: Image, containerd: Containerd) -> None:
    digest = index_row(soci).digest
    store = LayoutStore(soci.root / "content")
    unknown = sha256_digest(b"unknown")
    assert str(unknown) in soci.fails("index", "rm", digest, unknown)
    assert store.size(digest) > 0
    soci("index", "rm", digest)
    assert ArtifactDatabase(soci.root).indices() == []
    assert not store.path(digest).exists()
    soci("create", "--min-layer-size", "0", "--oci-layout", image.layout, NAME)
    name_in_containerd(containerd, image, NAME)
    soci("index", "remove", "--ref", NAME)
    assert ArtifactDatabase(soci.root).indices() == []


def test_index_rm_wants_one_way_of_naming(soci: Soci) -> None:
    for arguments in ((), ("--ref", NAME, str(sha256_digest(b"x")))):
        assert "either digests of indices or --ref" in soci.fails("index", "rm", *arguments)


def test_index_rm_forgives_content_that_is_gone(soci: Soci, image: Image) -> None:
    digest = index_row(soci).digest
    LayoutStore(soci.root / "content").remove(digest)
    soci("index", "rm", digest)
    assert ArtifactDatabase(soci.root).indices() == []


def test_ztoc_ls(soci: Soci, image: Image, containerd: Containerd) -> None:
    lines = soci("ztoc", "ls").out.splitlines()
    assert lines[0].split() == ["DIGEST", "SIZE", "LAYER", "DIGEST"]
    store = LayoutStore(soci.root / "content")
    expected = {(ztoc_of(soci, image, i), image.layers[i].digest) for i in (0, 1)}
    assert {(line.split()[0], line.split()[2]) for line in lines[1:]} == expected
    assert {int(line.split()[1]) for line in lines[1:]} == {store.size(digest) for digest, _ in expected}
    one = ztoc_of(soci, image, 1)
    assert soci("ztoc", "ls", "-q", "--ztoc-digest", one).out.split() == [one]
    name_in_containerd(containerd, image, NAME)
    assert set(soci("ztoc", "ls", "-q", "--image-ref", NAME).out.split()) == {
        digest for digest, _ in expected
    }
    other = sha256_digest(b"other")
    assert str(other) in soci.fails("ztoc", "ls", "--image-ref", NAME, "--ztoc-digest", other)


def test_ztoc_info(soci: Soci, image: Image) -> None:
    digest = ztoc_of(soci, image, 0)
    info = json.loads(soci("ztoc", "info", digest).out)
    files = {file["filename"]: file for file in info.pop("files")}
    assert info == {
        "version": "0.9",
        "build_tool": "tool",
        "size": LayoutStore(soci.root / "content").size(digest),
        "span_size": 65536,
        "num_spans": info["num_spans"],
        "num_files": 4,
        "num_multi_span_files": 1,
    }
    assert info["num_spans"] > 1
    assert list(files) == ["dir/", "dir/big", "empty", "link"]
    big = files["dir/big"]
    assert list(big) == ["filename", "offset", "size", "type", "start_span", "end_span"]
    assert (big["size"], big["type"], big["start_span"]) == (200_000, "reg", 0)
    assert big["end_span"] == info["num_spans"] - 1
    assert files["empty"]["start_span"] == files["empty"]["end_span"]
    index = index_row(soci).digest
    assert "see `soci index info`" in soci.fails("ztoc", "info", index)
    assert soci("index", "info", "--json", index).out == soci("index", "info", index).out
    unknown = sha256_digest(b"unknown")
    assert soci.fails("ztoc", "info", unknown).startswith(f"zTOC {unknown}: not known here")


def test_ztoc_get_file(soci: Soci, image: Image, tmp_path: Path, containerd: Containerd) -> None:
    digest = ztoc_of(soci, image, 0)
    layer = Digest(image.layers[0].digest)
    assert str(layer) in soci.fails("ztoc", "get-file", digest, "dir/big")
    content = image.layers[0].content
    assert isinstance(content, bytes)
    with containerd.lease() as leased:
        leased.content.write(content)
        target = tmp_path / "out"
        soci("ztoc", "get-file", digest, "dir/big", "-o", target)
        assert target.read_bytes() == FILES["dir/big"]
        soci("ztoc", "get-file", digest, "link", "-o", target)
        assert target.read_bytes() == FILES["dir/big"]
        assert "cannot write" in soci.fails("ztoc", "get-file", digest, "dir/big", "-o", tmp_path / "no/such")
        assert sorted(path.name for path in target.parent.iterdir() if target.name in path.name) == [
            target.name
        ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m0s"), (3605, "1h0m5s"), (90061, "25h1m1s"), (-5, "0s")],
)
def test_age(seconds: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    assert age(now - seconds) == f"{text} ago"
