"""A program that uses a snapshotter without pause until it is killed: `snapshot_churn.py ROOT SEED`.

Before each call it prints what it is about to do, and after it that it is done, one JSON list per line:
`["begin", METHOD, NAME, NEW_NAME]` and `["done"]`. So whoever kills it knows what was acknowledged, and what one
call may or may not have happened. `replay` tells what must then be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from snapshotter.errors import AlreadyExists
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.layers import Lazy
from snapshotter.snapshot.lock import RootLock
from snapshotter.snapshot.model import LABEL_TARGET, Kind, Usage
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.support.layer_providers import ScriptedLayers, some_digest

_FEW, _MANY = 3, 12


def replay(before: dict[str, Kind], lines: Iterable[str]) -> tuple[dict[str, Kind], dict[str, Kind]]:
    """Return what is there after the acknowledged calls, and what is if the last one happened too."""
    certain, possible = dict(before), dict(before)
    for line in lines:
        event, *call = json.loads(line)
        if event == "begin":
            _apply(possible, *call)
        else:
            certain = dict(possible)
    return certain, possible


def _apply(state: dict[str, Kind], method: str, name: str, new_name: str) -> None:
    match method:
        case "prepare":
            state[name] = Kind.ACTIVE
        case "view":
            state[name] = Kind.VIEW
        case "layer":
            state[new_name] = Kind.COMMITTED
        case "commit":
            del state[name]
            state[new_name] = Kind.COMMITTED
        case "remove":
            del state[name]


def churn(root: Path, seed: int) -> None:
    """Call for ever. Names are never used twice, also not by another seed."""
    chance = random.Random(seed)
    answer = Lazy(some_digest("layer"), Usage(1, 2))
    layers = ScriptedLayers({})
    sn = Snapshotter(root, SnapshotStore(metadata_path(root)), layers)
    number = 0
    while True:
        number += 1
        fresh = f"{seed}-{number}"
        known = {info.name: info for info in sn.walk()}
        parents = [name for name, info in known.items() if info.kind == Kind.COMMITTED] + [""]
        used = {info.parent for info in known.values()}
        leaves = [name for name in known if name not in used]
        active = [name for name, info in known.items() if info.kind == Kind.ACTIVE]
        methods = ["prepare", "view", "layer"] if len(known) < _MANY else []
        methods += ["commit"] if active else []
        methods += ["remove", "cleanup"] if len(known) > _FEW else []
        method = chance.choice(methods)
        if method in {"prepare", "view"}:
            _say("begin", method, fresh, "")
            getattr(sn, method)(fresh, chance.choice(parents))
        elif method == "layer":
            layers.answers = {fresh: answer}
            _say("begin", method, "", fresh)
            with contextlib.suppress(AlreadyExists):
                sn.prepare("key", chance.choice(parents), {LABEL_TARGET: fresh}, "default")
        elif method == "commit":
            name = chance.choice(active)
            _say("begin", method, name, fresh)
            sn.commit(fresh, name)
        elif method == "remove":
            name = chance.choice(leaves)
            _say("begin", method, name, "")
            sn.remove(name)
        else:
            _say("begin", method, "", "")
            sn.cleanup()
        _say("done")


def _say(*event: str) -> None:
    os.write(1, (json.dumps(event) + "\n").encode())


if __name__ == "__main__":
    with RootLock(Path(sys.argv[1])):
        churn(Path(sys.argv[1]), int(sys.argv[2]))
