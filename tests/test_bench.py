"""What the demo and the benchmarks stand on, as far as it needs no package from outside."""

import dataclasses
import gzip
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest

from bench import demo, image
from bench.figures import Figure, summary
from bench.image import Recipe

SMALL = Recipe("small", packages=(), files=(("app/main.py", "print(1)\n"),), weights=2 << 20)


def test_an_image_is_built_once(root: None, tmp_path: Path) -> None:
    steps: list[str] = []
    built = image.build(SMALL, cache=tmp_path, tell=steps.append)
    again = image.build(SMALL, cache=tmp_path, tell=steps.append)
    assert steps == ["image: application", "image: weights of 2 MiB"]
    assert built == again
    assert [path.name for path in tmp_path.iterdir()] == [SMALL.key]
    config = json.loads((built.layout / "index.json").read_text())["manifests"][0]
    assert config["digest"] == built.digest


def test_the_layers_of_an_image_hold_its_files(root: None, tmp_path: Path) -> None:
    application, weights = image.build(SMALL, cache=tmp_path).layers
    assert isinstance(application.content, Path)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(application.content.read_bytes()))) as archive:
        assert archive.getnames() == [".", "./app", "./app/main.py"]
    assert weights.size > 2 << 20


def test_another_recipe_is_another_image_and_replaces_the_first(root: None, tmp_path: Path) -> None:
    image.build(SMALL, cache=tmp_path)
    other = dataclasses.replace(SMALL, gzip_level=1)
    assert other.key != SMALL.key
    image.build(other, cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [other.key]


def test_a_build_that_failed_counts_for_nothing(root: None, tmp_path: Path) -> None:
    broken = dataclasses.replace(SMALL, files=(("a", ""), ("a/b", "")))
    with pytest.raises(FileExistsError):
        image.build(broken, cache=tmp_path)
    assert not (tmp_path / broken.key).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_demo_ends_in_order_when_it_is_told_to(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), demo.orderly_end():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_link_is_read_from_the_command_line() -> None:
    link = demo.parse_link("10,1000")
    assert (link.delay, link.rate) == (0.01, 125e6)
    with pytest.raises(ValueError, match="unpack"):
        demo.parse_link("10")


def test_a_figure_says_whether_its_goal_is_met() -> None:
    wall = Figure("create", "x reference", 0.33333, 0.33)
    assert wall.met is False
    assert json.loads(wall.to_json()) == {
        "figure": "create",
        "goal": "<= 0.33 x reference",
        "got": 0.3333,
        "unit": "x reference",
        "met": False,
    }
    rate = Figure("rate", "MB/s", 700.0, 450, better="more", detail={"layers": [1, 2]})
    assert rate.met is True
    assert json.loads(rate.to_json())["layers"] == [1, 2]
    absent = Figure("lazy", "x", None, 0.4, detail={"reason": "no reference"})
    told = Figure("size", "MiB", 3.0)
    assert absent.met is told.met is None
    assert json.loads(told.to_json())["goal"] == ""
    assert json.loads(summary([wall, rate, absent, told])) == {
        "goals": 3,
        "missed": ["create"],
        "not_measured": ["lazy"],
    }
