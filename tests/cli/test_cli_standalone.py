"""`soci convert --standalone`: OCI layouts in and out, without containerd."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from snapshotter.cli.main import main
from tests.cli.conftest import Soci
from tests.soci.images import multi_platform
from tests.support.images import Image, ImageBuilder, layer

CONVERT = ("--min-layer-size", "0", "--standalone")
V2 = "application/vnd.amazon.soci.index.v2+json"


@pytest.fixture
def soci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The program without any containerd."""
    root = tmp_path / "root"
    return Soci(["--address", "/nowhere", "--root", str(root)], root, capsys)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return ImageBuilder(tmp_path / "image").layer({"a": os.urandom(200_000)}).layer({"b": b"2"}).build()


def convert(soci: Soci, source: Path, target: Path, *options: str) -> str:
    return soci("convert", *CONVERT, *options, source, target).out.splitlines()[-1].split()[-1]


def listed(layout: Path) -> list[dict[str, Any]]:
    """The manifests of the one image of a layout."""
    (root,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    found: list[dict[str, Any]] = json.loads(blob(layout, root["digest"]))["manifests"]
    return found


def blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()


def test_directories_and_archives_give_the_same_image(soci: Soci, image: Image, tmp_path: Path) -> None:
    directory, archive, other = tmp_path / "dir", tmp_path / "a.tar", tmp_path / "b.tar"
    digest = convert(soci, image.layout, directory, "--format", "oci-dir")
    assert convert(soci, image.layout, archive) == digest
    assert convert(soci, archive, other) == digest
    assert archive.read_bytes() == other.read_bytes()
    assert convert(soci, directory, directory, "--format", "oci-dir") == digest
    entry, soci_entry = listed(directory)
    manifest = json.loads(blob(directory, entry["digest"]))
    assert manifest["annotations"] == {"com.amazon.soci.index-digest": soci_entry["digest"]}
    assert soci_entry["artifactType"] == V2
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert sorted(names[2:]) == sorted(
        f"blobs/sha256/{path.name}" for path in (directory / "blobs/sha256").iterdir()
    )
    assert not soci.root.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"image", "dir", "a.tar", "b.tar"}


def test_other_tools_read_it_and_copies_stay_lazy(soci: Soci, image: Image, tmp_path: Path) -> None:
    convert(soci, image.layout, tmp_path / "a.tar")
    source, copy = f"oci-archive:{tmp_path}/a.tar:latest", f"oci:{tmp_path}/copy:latest"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--all", source, copy], check=True, timeout=60
    )
    entry, soci_entry = listed(tmp_path / "copy")
    manifest = json.loads(blob(tmp_path / "copy", entry["digest"]))
    assert manifest["annotations"] == {"com.amazon.soci.index-digest": soci_entry["digest"]}
    index = json.loads(blob(tmp_path / "copy", soci_entry["digest"]))
    assert all(blob(tmp_path / "copy", one["digest"]) for one in index["layers"])


def test_platforms(soci: Soci, tmp_path: Path) -> None:
    source, some, every = tmp_path / "multi", tmp_path / "some", tmp_path / "every"
    multi_platform(source, {name: [layer({"a": os.urandom(99)})] for name in ("amd64", "arm64")})
    convert(soci, source, some, "--format", "oci-dir", "--platform", "linux/arm64")
    before, after = listed(source), listed(some)
    assert [after[0], after[2]] == [before[0], before[2]]
    convert(soci, source, every, "--format", "oci-dir", "--all-platforms")
    assert [one.get("artifactType") for one in listed(every)] == [None, None, None, V2, V2]
    assert (
        convert(soci, every, tmp_path / "again.tar", "-p", "linux/amd64")
        == json.loads((every / "index.json").read_bytes())["manifests"][0]["digest"]
    )


def test_manifests_that_are_not_there_are_left_out(soci: Soci, tmp_path: Path) -> None:
    source = tmp_path / "multi"
    multi_platform(source, {name: [layer({"a": name.encode()})] for name in ("amd64", "arm64", "s390x")})
    amd64, arm64, _, attestation = listed(source)
    (source / "blobs/sha256" / arm64["digest"][7:]).unlink()
    convert(soci, source, tmp_path / "two", "--format", "oci-dir", "-p", "linux/amd64")
    assert [one["platform"]["architecture"] for one in listed(tmp_path / "two")] == [
        *("amd64", "s390x", "unknown", "amd64")
    ]
    assert listed(tmp_path / "two")[2] == attestation
    assert listed(tmp_path / "two")[0]["digest"] != amd64["digest"]


def test_what_can_be_wrong(soci: Soci, image: Image, tmp_path: Path) -> None:
    docker = tmp_path / "docker.tar"
    with tarfile.open(docker, "w") as archive:
        archive.addfile(tarfile.TarInfo("manifest.json"), io.BytesIO())
    target = tmp_path / "out"
    assert "docker-save" in soci.fails("convert", *CONVERT, docker, target)
    assert "no such file" in soci.fails("convert", *CONVERT, tmp_path / "absent", target)
    assert "--format" in soci.fails("convert", *CONVERT, "--format", "docker", image.layout, target)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").touch()
    assert "not an OCI layout" in soci.fails("convert", *CONVERT, "--format", "oci-dir", image.layout, home)
    assert "is a directory" in soci.fails("convert", *CONVERT, image.layout, home)
    assert soci.fails("convert", "--standalone", image.layout, target).startswith("no ztocs created")
    damaged = image.layout / "blobs/sha256" / image.layers[1].digest[7:]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert image.layers[1].digest in soci.fails("convert", *CONVERT, image.layout, target)
    limit = ("--min-layer-size", "1000", "--standalone")
    assert image.layers[1].digest in soci.fails("convert", *limit, image.layout, target)
    damaged.unlink()
    assert image.layers[1].digest in soci.fails("convert", *limit, image.layout, target)
    assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docker.tar", "home", "image"]


def test_help_names_both_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "{oci-archive,oci-dir}" in capsys.readouterr().out
