"""What the demo and the benchmarks stand on, as far as it needs no package from outside."""

import dataclasses
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bench import __main__ as program
from bench import code, coldstart, demo, growth, identity, idle, image, misses, mixed, mounts, readme, restart
from bench.contenders import Reference
from bench.figures import Figure, summary
from bench.goals import GOALS, LINK
from bench.image import Recipe
from tests.support.netns import LoneHost

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
        "missed": [{"figure": "create", "goal": "<= 0.33 x reference", "got": 0.3333}],
        "not_measured": ["lazy"],
    }


def trial(contender: str, pull: float, second: float = 1.0) -> coldstart.Trial:
    facts = {"ondemand_ranges": 50.0, "ondemand_bytes": 120.0, "touched_bytes": 100.0}
    return coldstart.Trial(contender, pull, 0.5, 2.0, second=second, dropped=second, facts=facts)


def test_figures_of_cold_starts_compare_medians() -> None:
    trials = {
        "full": [trial("full", pull) for pull in (20.0, 27.5, 30.0)],
        "ours": [trial("ours", pull) for pull in (1.5, 0.5, 9.0)],
    }
    trials["ours"][-1].second = 1.2
    found = {figure.name: figure for figure in coldstart.figures(LINK, trials)}
    assert found[f"cold start, full, {LINK}"].got == 30.0
    assert found[f"cold start over full pull, {LINK}"].got == pytest.approx(4.0 / 30.0)
    assert found[f"cold start over full pull, {LINK}"].met
    assert found[f"cold start over reference, {LINK}"].got is None
    assert found[f"second container over overlayfs, warm, {LINK}"].got == pytest.approx(1.2)
    assert found[f"on-demand bytes over those of the spans touched, {LINK}"].got == pytest.approx(1.2)


def test_our_own_programs_are_not_taken_for_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("soci", "soci-snapshotter-grpc"):
        (tmp_path / name).write_text("#!/usr/bin/python3\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("REFERENCE_SOCI", str(tmp_path))
    assert not Reference.available()
    for name in ("soci", "soci-snapshotter-grpc"):
        (tmp_path / name).write_bytes(b"\x7fELF")
    assert Reference.available()


def test_a_lone_host_reaches_itself_and_nobody_else(root: None) -> None:
    program = (
        "import socket, sys; server = socket.create_server((sys.argv[1], 0));"
        " socket.create_connection(server.getsockname()); print(len(socket.if_nameindex()))"
    )
    with LoneHost() as alone:
        command = [*alone.host.prefix, sys.executable, "-c", program, alone.host.address]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("program", [identity, mixed])
def test_without_a_reference_there_is_nothing_to_compare_with(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("REFERENCE_SOCI", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["program"])
    assert program.main() == 2
    assert "REFERENCE_SOCI" in capsys.readouterr().err


def test_a_score_names_what_differs() -> None:
    score = identity.Score()
    score.count("one", same=True)
    score.count("two", same=False)
    assert (str(score), score.different) == ("1 of 2", ["two"])


def test_the_readme_has_the_table_of_exactly_these_goals() -> None:
    text = readme.README.read_text()
    inside = text[text.index(readme.BEGIN) + len(readme.BEGIN) : text.index(readme.END)].strip().splitlines()
    assert inside[:2] == list(readme.HEAD)
    rows = [line.strip("| ").split(" | ") for line in inside[2:]]
    assert [(name, limit) for name, limit, _ in rows] == [
        (goal.name, goal.figure(None).limit) for goal in GOALS
    ]
    numbers = re.compile(r"-|(\*\*)?[\d.e+]+( [A-Za-z%].*?)?(\*\*)?")
    assert [got for _, _, got in rows if not numbers.fullmatch(got)] == []


def test_a_table_shows_what_was_measured_and_what_was_missed(tmp_path: Path) -> None:
    place = tmp_path / "README.md"
    place.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    met, missed = GOALS[0].figure(0.251), GOALS[1].figure(0.4)
    readme.write([met, missed], place)
    lines = place.read_text().splitlines()
    assert lines[4] == f"| {GOALS[0].name} | <= 0.3 x | 0.251 x |"
    assert lines[5] == f"| {GOALS[1].name} | <= 0.3 x | **0.4 x** |"
    assert lines[6].endswith("| - |")
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)


def test_the_code_can_be_measured_and_every_figure_has_its_goal() -> None:
    found = {figure.name: figure for figure in code.figures()}
    assert set(found) == {one.name for one in GOALS if one.name.startswith("code, ")}
    assert found["code, import cycles"].got == 0


def test_a_section_that_fails_leaves_its_goals_unmeasured(
    tmp_path: Path, root: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(directory: Path) -> Iterator[Figure]:
        yield GOALS[0].figure(0.1)
        raise AssertionError(f"no registry in {directory.name[:3]}")

    monkeypatch.setattr(program, "SECTIONS", {"broken": fail})
    monkeypatch.setattr(program, "RESULTS", tmp_path / "bench.jsonl")
    assert program.main(["broken"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == {"section": "broken", "failed": "no registry in sb-"}
    assert lines[-1]["goals"] == len(GOALS)
    assert GOALS[0].name not in lines[-1]["not_measured"]
    assert GOALS[1].name in lines[-1]["not_measured"]
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == len(GOALS)


def test_a_tree_is_listed_and_read_cold_and_again(root: None, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    for number in range(20):
        (tree / "a" / f"{number}").write_bytes(b"x" * number)
    times = mounts.by_turns(tmp_path, {"ours": tree}, rounds=1)["ours"]
    assert set(times) <= {goal.name for goal in GOALS}
    assert len(times) == 4
    assert min(times.values()) > 0
    assert mounts.shell(f"find {tree} -type f | wc -l")[1] == 20


@pytest.mark.usefixtures("fuse")
def test_requests_are_measured_beside_a_server_in_c(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROUNDS", 2), ("_BIG", 1 << 20), ("_PAGES", 50), ("_NAMES", 20)):
        monkeypatch.setattr(misses, name, value)
    figures = list(misses.figures(workdir))
    assert {figure.name for figure in figures} <= {goal.name for goal in GOALS}
    assert len(figures) == 3
    assert all(figure.got for figure in figures)


@pytest.mark.usefixtures("fuse")
def test_a_daemon_at_rest_is_watched(workdir: Path) -> None:
    figures = list(idle.figures(workdir, mounts=restart.LAYERS, seconds=1.0, settle=0.0))
    assert [figure.name for figure in figures] == [
        "processor, all idle", "wake-ups, all idle, beside grpcio's", "scrape with 200 mounts",
    ]  # fmt: skip
    assert all(figure.got is not None and figure.got >= 0 for figure in figures)
    assert figures[1].detail["grpcio_per_s"] > 0


def test_a_layer_of_many_files_is_a_layer(tmp_path: Path) -> None:
    blob = growth._many_files(tmp_path, 1500)
    assert isinstance(blob.content, Path)
    with tarfile.open(blob.content) as archive:
        names = archive.getnames()
    assert names[0] == "d000000/f000000"
    assert names[-2:] == ["d000001/f000499", "last"]
    assert len(names) == 1501
