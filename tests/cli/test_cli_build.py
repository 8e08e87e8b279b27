"""What `create` and `convert` share: prefetch lists, optimisations, strictness, JSON, progress."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from snapshotter.cli.progress import TerminalProgress, size_text, summary
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import SociIndex, parse
from snapshotter.soci.prefetch import parse as parse_prefetch
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest
from tests.cli.conftest import Soci
from tests.support.images import Entry, Image, ImageBuilder

CREATE = ("create", "--min-layer-size", "0", "--span-size", "65536")


@pytest.fixture
def soci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The program without any containerd."""
    root = tmp_path / "root"
    return Soci(["--address", "/nowhere", "--root", str(root)], root, capsys)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    attributes = {"x": Entry(b"x", pax={"SCHILY.xattr.user.a": "1"}), "y": b"<>"}
    return ImageBuilder(tmp_path / "image").layer({"a/b": os.urandom(200_000)}).layer(attributes).build()


def create(soci: Soci, image: Image, *options: str | Path) -> SociIndex:
    """Build the image's index and return it."""
    soci(*CREATE, "--oci-layout", image.layout, *options, "app")
    row = ArtifactDatabase(soci.root).indices()[0]
    return parse(read_verified(LayoutStore(soci.root / "content"), row.digest))


def test_prefetch_artifacts_stand_behind_the_ztocs(soci: Soci, image: Image, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    listed.write_text('["./y", "absent"]')
    soci.capture.readouterr()
    index = create(soci, image, "--prefetch-file", "/a/*", "--prefetch-files-json", listed)
    assert [layer for layer, _ in index.prefetch] == [one.digest for one in image.layers]
    types = [one["mediaType"] for one in json.loads(index.data)["layers"]]
    assert types == ["application/octet-stream"] * 2 + ["application/vnd.amazon.soci.prefetch.v1+json"] * 2
    store = LayoutStore(soci.root / "content")
    (all_spans,) = parse_prefetch(read_verified(store, index.prefetch[0][1].digest))
    assert (all_spans.first, all_spans.last > 0) == (0, True)
    soci.options += ["--content-store", "soci"]
    rows = soci("prefetch", "ls").out.splitlines()
    assert rows[0].split() == ["DIGEST", "LAYER", "DIGEST", "SPANS", "CREATED"]
    assert {line.split()[1] for line in rows[1:]} == {one.digest for one in image.layers}
    digest = str(index.prefetch[0][1].digest)
    spans = all_spans.last + 1
    assert {one["Digest"]: one["TotalSpans"] for one in json.loads(soci("prefetch", "ls", "--json").out)}[
        digest
    ] == spans
    text = soci("prefetch", "info", digest).out
    assert f"[0] StartSpan: 0, EndSpan: {all_spans.last} (covers {all_spans.last + 1} spans)" in text
    assert f"Layer Digest:  {image.layers[0].digest}\n" in text
    info = json.loads(soci("prefetch", "info", "--json", digest).out)
    assert info["prefetch_spans"] == [{"start_span": 0, "end_span": all_spans.last}]
    assert "not known" in soci.fails("prefetch", "info", "sha256:" + "0" * 64)


def test_a_prefetch_name_that_is_not_there(soci: Soci, image: Image, tmp_path: Path) -> None:
    layout = ("--oci-layout", image.layout, "--prefetch-file", "absent")
    outcome = soci(*CREATE, *layout, "app")
    assert outcome.err == "[WARN] prefetch absent: no such file in an indexed layer\n"
    assert "absent" in soci.fails(*CREATE, *layout, "--strict", "app")
    broken = tmp_path / "list.json"
    broken.write_text('{"a": 1}')
    assert "not an array" in soci.fails(*CREATE, *layout, "--prefetch-files-json", broken, "app")
    assert "No such file" in soci.fails(*CREATE, *layout, "--prefetch-files-json", tmp_path / "none", "app")


def test_layers_without_attributes_are_marked(soci: Soci, image: Image) -> None:
    assert [entry.disable_xattrs for entry in create(soci, image).ztocs] == [False, False]
    index = create(soci, image, "--optimizations", "xattr")
    assert [entry.disable_xattrs for entry in index.ztocs] == [True, False]
    assert "there is xattr" in soci.fails(*CREATE, "--optimizations", "speed", "app")


def test_json_says_what_became_of_each_layer(soci: Soci, tmp_path: Path) -> None:
    builder = ImageBuilder(tmp_path / "mixed").layer({"z": b"z"}, compression="zstd").layer({"a": b"a"})
    image = builder.build()
    command = (*CREATE, "--oci-layout", image.layout, "--json")
    (index,) = json.loads(soci(*command, "app").out)["indices"]
    zstd, gzip = index["layers"]
    assert zstd["skipped"] == "cannot be indexed: compressed with zstd"
    assert gzip["ztoc"]["reused"] is False
    assert index["digest"] == ArtifactDatabase(soci.root).indices()[0].digest
    assert "compressed with zstd" in soci.fails(*command, "--strict", "app")
    out = soci("convert", "--standalone", "--min-layer-size", "0", "--json", image.layout, tmp_path / "o").out
    document: dict[str, Any] = json.loads(out)
    assert (len(document["indices"]), document["skipped"]) == (1, [])
    assert document["image"].startswith("sha256:")


def test_lists_as_json(soci: Soci, image: Image) -> None:
    index = create(soci, image)
    (listed,) = json.loads(soci("index", "ls", "--json").out)
    assert (listed["digest"], listed["version"], listed["platform"]) == (index.digest, 1, "linux/amd64")
    ztocs = json.loads(soci("ztoc", "ls", "--json").out)
    assert {one["layer_digest"] for one in ztocs} == {one.digest for one in image.layers}


def test_flags_that_others_pass_are_accepted(soci: Soci, image: Image) -> None:
    accepted = ("-k", "--refresh", "--hosts-dir", "/", "--tlscacert", "/c", "--http-dump", "--http-trace")
    create(soci, image, *accepted)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Descriptor("type", Digest("sha256:" + "ab" * 32), 4 << 20)
    for stream in (Terminal(), io.StringIO()):
        progress = TerminalProgress(stream)
        progress.begin([layer])
        progress.advance(layer, 1 << 20)
        if stream.isatty():
            assert (
                stream.getvalue().splitlines()[0] == "abababababab [#####               ] 1.0 MiB of 4.0 MiB"
            )
            assert "1.0 MiB of 4.0 MiB," in stream.getvalue().splitlines()[1]
        progress.end(layer)
        progress.print("a line")
        progress.close()
        assert stream.getvalue().endswith("\x1b[2A\x1b[J" if stream.isatty() else "")
    assert capsys.readouterr().out == "a line\na line\n"
    assert size_text(1023) == "1023 B"
    assert summary(50, 100, 5).endswith("50 B of 100 B, 10 B/s, 5 s left")
