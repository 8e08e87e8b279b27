"""The corpus as an image: what is made of it is, byte for byte, what the reference made."""

from __future__ import annotations

import json
from pathlib import Path

from snapshotter.cli.main import main
from tests.support import corpus


def test_the_converted_image_has_the_reference_s_digest(tmp_path: Path) -> None:
    """The digest of the list of manifests stands for all below it: manifest, SOCI index, zTOCs."""
    version = corpus.VERSIONS[-1]
    cases = [case for case in corpus.CASES if not case.large and corpus.trusted(case, version)]
    image = corpus.image(tmp_path / "image", cases, "1")
    options = ["--span-size", str(corpus.SPAN_SIZE), "--min-layer-size", "0", "--format", "oci-dir"]
    tool = ["--build-tool-identifier", corpus.build_tool(version)]
    layouts = [str(image.layout), str(tmp_path / "made")]
    assert main(["--root", str(tmp_path), "convert", "--standalone", *options, *tool, *layouts]) == 0
    (root,) = json.loads((tmp_path / "made/index.json").read_bytes())["manifests"]
    facts = {
        (fact.version, fact.layer): fact.ztoc for fact in corpus.facts() if fact.name == corpus.CONVERTED
    }
    assert root["digest"] == facts[version, image.digest]
