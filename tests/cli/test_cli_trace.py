"""`soci trace`: which start is shown, what is said of it, and a picture that can be looked at."""

from __future__ import annotations

import json
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapshotter.cli.main import main
from snapshotter.cli.timeline import Bar, covered, find_start, verdict
from snapshotter.cli.waterfall import render
from snapshotter.errors import NotFound, UsageError
from snapshotter.units import sha256_digest

ONE, TWO, MANIFEST = (sha256_digest(name) for name in (b"one", b"two", b"manifest"))
IMAGE = f"registry.example/app:1@{MANIFEST}"
OTHER = f"registry.example/other@{TWO}"


def short(digest: str) -> str:
    return digest.partition(":")[2][:16]


def step(
    phase: str, start: float, seconds: float, about: str = ONE, *, failed: bool = False
) -> dict[str, Any]:
    return {"phase": phase, "about": about, "start": start, "seconds": seconds, "failed": failed}


def event(kind: str, start: float, seconds: float, layer: str = ONE, size: int = 0) -> dict[str, Any]:
    return {
        "kind": kind, "layer": short(layer), "start": start, "seconds": seconds, "span": 3, "spans": 1, "bytes": size,
    }  # fmt: skip


def report(steps: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[str, Any]:
    layers = {
        short(ONE): {"digest": ONE, "images": [IMAGE], "manifests": [MANIFEST]},
        short(TWO): {"digest": TWO, "images": [OTHER], "manifests": [TWO]},
    }
    return {
        "format": 1,
        "now": 1000.0,
        "wall": 1_700_000_000.0,
        "layers": layers,
        "steps": steps,
        "events": events,
    }


PULL = [
    step("index", 100, 0.2, MANIFEST),
    step("provide", 100.2, 0.6),
    step("ztoc", 100.2, 0.3),
    step("mount", 100.7, 0.05),
]
RUN = [
    event("wait", 101, 0.5),
    event("on_demand", 101, 0.4, size=4_000_000),
    event("wait", 101.2, 0.5),
    event("background", 90, 15.0, size=60_000_000),
    event("background", 80, 2.0, size=1),
]


def test_a_start_is_what_came_after_the_last_pause() -> None:
    early = [step("provide", 10, 1.0), step("provide", 20, 1.0)]
    start = find_start(report([*early, *PULL], RUN))
    assert [bar.kind for bar in start.steps] == ["index", "provide", "ztoc", "mount"]
    assert start.steps[0].start == 0
    assert start.seconds == pytest.approx(1.7)
    assert start.began == 1_700_000_000 - 900
    assert start.images == (IMAGE,)
    assert start.layers == [ONE, MANIFEST]
    assert [bar.size for bar in start.ranges] == [60_000_000, 4_000_000]  # what overlaps with it


def test_an_image_can_be_asked_for() -> None:
    later = [step("provide", 500, 1.0, TWO), event("wait", 501, 1.0, TWO)]
    told = report([*PULL, later[0]], [*RUN, later[1]])
    assert find_start(told).images == (OTHER,)
    for name in (IMAGE, "registry.example/app:1"):
        start = find_start(told, image=name)
        assert start.images == (IMAGE,)
        assert start.seconds == pytest.approx(1.7)


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(NotFound, match="nothing was pulled"):
        find_start(report([], []))
    with pytest.raises(NotFound, match="no lazy layer of registry"):
        find_start(report(PULL, RUN), image="registry.example/none:1")
    with pytest.raises(UsageError, match="another version"):
        find_start({"format": 2})


def test_waits_that_overlap_count_once() -> None:
    bars = [Bar("wait", ONE, start, seconds, "") for start, seconds in ((0, 2), (1, 2), (1, 0.5), (5, 1))]
    assert covered(bars) == 4
    assert covered([]) == 0


def test_the_verdict_names_what_took_the_time() -> None:
    said = verdict(find_start(report(PULL, RUN)))
    assert "1 layers became lazy in 0.60 s (fetching zTOCs 0.30 s, finding the index 0.20 s)" in said
    assert (
        "readers waited 2 times, 0.70 s of the 1.70 s (41 %); the longest wait was 0.50 s for span 3 of"
        in said
    )
    assert "1 ranges on demand brought 4.0 MB." in said
    assert "1 ranges in the background brought 60.0 MB." in said
    assert said.endswith("it went into the program itself.")
    waiting = [event("wait", 101, 20.0), event("on_demand", 101, 20.0, size=40_000_000)]
    assert "with 2 MB/s while they were fetched" in verdict(find_start(report(PULL, waiting)))
    mounting = [step("provide", 100, 9.0), step("unpack", 104, 5.0, TWO)]
    said = verdict(find_start(report(mounting, [event("wait_failed", 109, 0.1)])))
    assert "1 layers were not lazy and took 5.00 s" in said
    assert "1 of all this failed" in said
    assert said.endswith("layers without a zTOC.")


def test_the_picture_has_a_bar_for_everything_and_nothing_from_elsewhere() -> None:
    start = find_start(report(PULL, RUN))
    page = render(start, "<b>said</b>")
    assert "&lt;b&gt;said&lt;/b&gt;" in page
    assert "<script" not in page
    assert "src=" not in page
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    bars = svg.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(PULL) + 4
    for bar in bars:
        assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= 1201
    tips = [str(bar[0].text) for bar in bars]
    assert "range on demand: span 3, 400.0 ms at 1.000 s, 4.00 MB" in tips


@contextmanager
def answering(root: Path, told: dict[str, Any]) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "trace.sock"))
        listener.listen()

        def answer() -> None:
            connection, _address = listener.accept()
            with connection:
                connection.sendall(json.dumps(told).encode())

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


def test_the_command(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = workdir / "start.html"
    with answering(workdir, report(PULL, RUN)):
        assert main(["--root", str(workdir), "trace", "-o", str(page)]) == 0
    assert capsys.readouterr().out.startswith("1 layers became lazy")
    assert page.read_text().startswith("<!doctype html>")
    (workdir / "trace.sock").unlink()
    with answering(workdir, report(PULL, RUN)):
        assert main(["trace", "--json", "--root", str(workdir)]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1


def test_no_daemon(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(workdir), "trace"]) == 1
    assert "no snapshotter answers on" in capsys.readouterr().err
