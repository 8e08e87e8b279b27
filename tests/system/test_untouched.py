"""Nobody who holds a FUSE descriptor resolves a path at or below a lazy mount.

Every layer server and the zygote are stopped, so that whoever asks a lazy mount for anything waits for ever; then everything that
the daemon does for containerd, for an operator and for itself is done, and has to end.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem
from tests.support.process import wait_until

SNAPSHOTS = ("snapshots", "--snapshotter", "soci")


def freeze(system: LazySystem) -> list[int]:
    """Stop every layer server and who starts them, and empty the kernel's caches; return who was stopped."""
    pids = [system.daemon.status()["pids"]["zygote"]]
    os.kill(pids[0], signal.SIGSTOP)
    for pid in [mount["pid"] for mount in system.mounts() if mount["pid"]]:
        with suppress(ProcessLookupError):  # it has just gone to sleep, and now nobody can wake it
            os.kill(pid, signal.SIGSTOP)
            pids.append(pid)
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    return pids


def test_everything_works_while_no_lazy_path_can_be_resolved(
    system: LazySystem, module_workdir: Path
) -> None:
    builder = ImageBuilder(module_workdir / "image")
    builder.layer({"a/b": b"1" * 100_000}).layer({"a/c": b"2" * 100_000, "x/y": b"3"})
    reference = system.publish(builder.build(), "test/untouched", "--min-layer-size", "0")
    system.pull(reference)
    wait_until(lambda: all(m["verified"] for m in system.mounts()), timeout=30, what="layers are verified")
    committed = [line.split()[0] for line in system.containerd.ctr(*SNAPSHOTS, "ls").splitlines()[1:]]
    assert len(committed) == 2
    frozen = freeze(system)
    ctr = system.containerd.ctr
    ctr(*SNAPSHOTS, "usage", timeout=60)
    for name in committed:
        ctr(*SNAPSHOTS, "info", name, timeout=60)
        ctr(*SNAPSHOTS, "prepare", f"up-{name}", name, timeout=60)
        ctr(*SNAPSHOTS, "view", f"view-{name}", name, timeout=60)
        ctr(*SNAPSHOTS, "mounts", str(module_workdir / "target"), f"up-{name}", timeout=60)
        for key in (f"up-{name}", f"view-{name}"):  # containerd may have collected them by now
            ctr(*SNAPSHOTS, "rm", key, timeout=60, check=False)
    assert len(system.mounts()) == 2
    assert system.daemon.metrics()["soci_fetch_layers_open"] == 2
    system.daemon.stop()
    for pid in frozen:
        with suppress(ProcessLookupError):  # who lived for the daemon alone has ended with it
            os.kill(pid, signal.SIGKILL)
    system.daemon.start()
    assert len(system.mounts()) == 2
    freeze(system)
    ctr("images", "rm", "--sync", reference, timeout=20)
    wait_until(lambda: not system.mounts(), timeout=60, what="the layers are unmounted")
    assert list((system.daemon.root / "snapshotter/snapshots").iterdir()) == []
