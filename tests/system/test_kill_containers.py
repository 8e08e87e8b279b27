"""Containers of a real containerd read on while every process of ours is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import toolbox
from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem

_RANDOM = random.Random(23)
FILES = {f"d/f{number:02}": _RANDOM.randbytes(_RANDOM.randrange(1, 200_000)) for number in range(40)}
ROUNDS = 3


@pytest.fixture(scope="module")
def truth(module_workdir: Path) -> Path:
    directory = module_workdir / "truth"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(scope="module")
def reference(system: LazySystem, module_workdir: Path) -> str:
    image = ImageBuilder(module_workdir / "image").layer(FILES, level=1).build()
    reference = system.publish(image, "test/containers", "--min-layer-size", "0", "--span-size", "131072")
    system.pull(reference)
    return reference


def test_containers_do_not_notice_the_end_of_everything(
    system: LazySystem, module_workdir: Path, reference: str, truth: Path
) -> None:
    flags = module_workdir / "flags"
    flags.mkdir()
    tools = toolbox.make(module_workdir / "toolbox")

    def read(seed: int) -> dict[str, Any]:
        program = toolbox.command("/run/tools", "reader.py", "/", "/run/truth", str(seed), "/run/flags/stop")
        mounts = {tools: "/run/tools", truth: "/run/truth", flags: "/run/flags"}
        report: dict[str, Any] = json.loads(
            system.containerd.run(reference, *program, snapshotter="soci", mounts=mounts)
        )
        return report

    with ThreadPoolExecutor(2) as pool:
        containers = [pool.submit(read, seed) for seed in range(2)]
        try:
            for _ in range(ROUNDS):
                time.sleep(0.7)
                kill_all_but_the_holder(system)
                system.daemon.start()
            time.sleep(0.3)
        finally:
            (flags / "stop").touch()
        reports = [container.result(60) for container in containers]
    for report in reports:
        assert (report["errors"], report["wrong"]) == ([], [])
        assert sum(report["reads"].values()) > 100


def kill_all_but_the_holder(system: LazySystem) -> None:
    """Kill the daemon and what belongs to it; without a service manager nobody would keep the holder's descriptors."""
    holder = system.daemon.status()["pids"]["holder"]
    for pid in system.daemon.processes() - {holder}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    system.daemon.kill()
