"""`soci index verify` and `soci ztoc diff`: what is right is called so, what is wrong is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import IndexVersion, SociIndex, build, parse
from snapshotter.soci.layout import OciLayout
from snapshotter.soci.platforms import find_images
from snapshotter.soci.store import LayoutStore
from snapshotter.soci.verify import verify
from snapshotter.units import Digest
from snapshotter.ztoc.parse import parse as parse_ztoc
from snapshotter.ztoc.serialize import serialize
from snapshotter.ztoc.spans import spans_of
from tests.cli.conftest import Soci
from tests.support.images import Image, ImageBuilder

CREATE = ("create", "--min-layer-size", "0", "--span-size", "65536", "--prefetch-file", "*")
OTHER = "sha256:" + "0" * 64


@pytest.fixture
def soci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The program without any containerd."""
    root = tmp_path / "root"
    options = ["--address", "/nowhere", "--content-store", "soci", "--root", str(root)]
    return Soci(options, root, capsys)


@pytest.fixture
def image(tmp_path: Path, soci: Soci) -> Image:
    image = ImageBuilder(tmp_path / "image").layer({"a": os.urandom(300_000)}).layer({"b": b"2"}).build()
    soci(*CREATE, "--oci-layout", image.layout, "app")
    return image


def index_of(soci: Soci) -> SociIndex:
    row = ArtifactDatabase(soci.root).indices()[0]
    return parse(read_verified(store_of(soci), row.digest))


def store_of(soci: Soci) -> LayoutStore:
    return LayoutStore(soci.root / "content")


def findings(soci: Soci, image: Image, index: SociIndex) -> list[str]:
    with OciLayout(image.layout) as layout:
        (one,) = find_images(layout, layout.index.manifests[0], None, "app")
        return [str(finding) for finding in verify(index, one, store_of(soci), layout)]


def test_what_create_and_convert_make_is_right(soci: Soci, image: Image, tmp_path: Path) -> None:
    command = ("index", "verify", "--oci-layout")
    assert soci(*command, image.layout, "app").out == f"index {index_of(soci).digest} (linux/amd64): ok\n"
    convert = ("convert", "--standalone", "--min-layer-size", "0", "--optimizations", "xattr")
    soci(*convert, image.layout, tmp_path / "new.tar")
    (verdict,) = json.loads(soci(*command, tmp_path / "new.tar", "--json", "app").out)
    assert (verdict["ok"], verdict["findings"]) == (True, [])


def test_a_damaged_layer_is_named_with_its_span(soci: Soci, image: Image) -> None:
    blob = image.layout / "blobs/sha256" / image.layers[0].digest[7:]
    data = bytearray(blob.read_bytes())
    data[100_000] ^= 1
    blob.write_bytes(data)
    outcome = soci("index", "verify", "--oci-layout", image.layout, "app", code=1)
    assert f"layer {image.layers[0].digest}: span 1: its bytes have digest" in outcome.out
    assert "span 0:" not in outcome.out
    assert outcome.err == "soci: image app: 1 of 1 indices wrong\n"


def test_a_wrong_claim_of_a_ztoc_is_named(soci: Soci, image: Image) -> None:
    index, store = index_of(soci), store_of(soci)
    first = index.ztocs[0]
    ztoc = parse_ztoc(read_verified(store, first.ztoc))
    entry = ztoc.entries[0]._replace(uid=7)
    compression = replace(ztoc.compression, span_digests=(Digest(OTHER), *ztoc.compression.span_digests[1:]))
    data = serialize(replace(ztoc, entries=(entry,), compression=compression))
    lie = replace(first, ztoc=store.write(data), ztoc_size=len(data))
    wrong = build(IndexVersion.V1, [lie, index.ztocs[1]], build_tool="x", subject=index.subject)
    found = findings(soci, image, wrong)
    assert found[0] == f"layer {first.layer}: zTOC -> tar: file a: uid 7 -> 0"
    assert found[1].startswith(f"layer {first.layer}: span 0: its bytes have digest")
    assert len(found) == 2


def test_a_checkpoint_that_inflates_to_something_else_is_named(soci: Soci, tmp_path: Path) -> None:
    words = b" ".join(b"%d" % (number * number % 9973) for number in range(100_000))
    image = ImageBuilder(tmp_path / "words").layer({"a": words}).build()
    soci(*CREATE, "--force", "--oci-layout", image.layout, "app")
    index, store = index_of(soci), store_of(soci)
    (entry,) = index.ztocs
    data = bytearray(read_verified(store, entry.ztoc))
    span = spans_of(parse_ztoc(bytes(data)))[1]
    data[span.window_offset : span.window_offset + 32768] = bytes(32768)
    lie = replace(entry, ztoc=store.write(bytes(data)))
    wrong = build(IndexVersion.V1, [lie], build_tool="x", subject=index.subject)
    assert findings(soci, image, wrong) == [
        f"layer {entry.layer}: span 1: from its checkpoint it inflates to other bytes than the layer has there"
    ]


def test_a_span_for_every_block_is_right(soci: Soci, image: Image) -> None:
    soci(*CREATE[:3], "--span-size", "0", "--force", "--oci-layout", image.layout, "app")
    assert findings(soci, image, index_of(soci)) == []


@pytest.mark.parametrize(("compression", "size"), [("gzip", 2**63), ("uncompressed", 0)])
def test_a_span_size_that_cannot_be_is_named(soci: Soci, tmp_path: Path, compression: str, size: int) -> None:
    builder = ImageBuilder(tmp_path / "sizes").layer({"a": os.urandom(100_000)}, compression=compression)
    image = builder.build()
    soci(*CREATE, "--oci-layout", image.layout, "app")
    index = index_of(soci)
    lie = replace(index.ztocs[0], span_size=size)
    wrong = build(IndexVersion.V1, [lie], build_tool="x", subject=index.subject)
    said = f"layer {lie.layer}: the index gives it a span size of {size} bytes, which cannot be"
    assert said in findings(soci, image, wrong)


def test_a_wrong_index_is_named(soci: Soci, image: Image) -> None:
    index = index_of(soci)
    assert index.subject is not None
    one, two = index.ztocs
    subject = replace(index.subject, digest=Digest(OTHER))
    strange = replace(one, layer=Digest(OTHER))
    gone = replace(two, ztoc=Digest(OTHER), layer_media_type="text/plain")
    found = findings(soci, image, build(IndexVersion.V1, [gone, one], build_tool="x", subject=subject))
    assert "its subject is" in found[0]
    assert "not in the order" in found[1]
    assert f"zTOC {OTHER}" in found[2]
    assert "does not have" in findings(soci, image, build(IndexVersion.V2, [strange], build_tool="x"))[0]


def test_an_image_without_index(soci: Soci, tmp_path: Path) -> None:
    image = ImageBuilder(tmp_path / "other").layer({"a": b"1"}).build()
    assert "no SOCI index" in soci.fails("index", "verify", "--oci-layout", image.layout, "app")


def test_ztoc_diff(soci: Soci, image: Image, tmp_path: Path) -> None:
    one, two = (str(entry.ztoc) for entry in index_of(soci).ztocs)
    assert soci("ztoc", "diff", one, one).out == ""
    outcome = soci("ztoc", "diff", one, two, code=1)
    lines = outcome.out.splitlines()
    assert "file a: only in the first" in lines
    assert "file b: only in the second" in lines
    ztoc = parse_ztoc(read_verified(store_of(soci), Digest(one)))
    changed = tmp_path / "ztoc"
    changed.write_bytes(serialize(replace(ztoc, build_tool="x", entries=(ztoc.entries[0]._replace(mode=0),))))
    found = json.loads(soci("ztoc", "diff", "--json", one, changed, code=1).out)
    assert found == [f"build tool: {ztoc.build_tool} -> x", "file a: mode 420 -> 0"]
    assert "No such file" in soci.fails("ztoc", "diff", one, tmp_path / "none")
    changed.write_bytes(b"")
    assert str(changed) in soci.fails("ztoc", "diff", one, changed)
