"""Any sequence of calls: the snapshotter answers as a few lines of Python that hold the contract's rules do."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from snapshotter.errors import AlreadyExists, ContractError, FailedPrecondition, InvalidArgument, NotFound
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.layers import Deferred, Lazy, Local, Provided
from snapshotter.snapshot.model import LABEL_TARGET, Kind, Usage
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.support.layer_providers import ScriptedLayers, some_digest

NAMES = st.sampled_from(["a", "b", "c", "d"])
PARENTS = st.sampled_from(["", "a", "b", "c", "d"])
LABELS = st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["", "1", "2"]))
ANSWERS: st.SearchStrategy[Provided] = st.sampled_from(
    [Lazy(some_digest("layer"), Usage(1, 2)), Local(Usage(3, 4)), Deferred("no-index")]
)
PATHS = st.lists(st.sampled_from(["labels", "labels.x", "labels.y", "parent"]), max_size=2)


@dataclass
class Entry:
    """One snapshot, as the model knows it."""

    kind: Kind
    parent: str
    labels: dict[str, str] = field(default_factory=dict)


class Model:
    """The contract in a dictionary. Each method returns the error that the call must raise, if any."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def create(self, kind: Kind, key: str, parent: str, labels: dict[str, str]) -> type[ContractError] | None:
        if parent and parent not in self.entries:
            return NotFound
        if parent and self.entries[parent].kind != Kind.COMMITTED:
            return InvalidArgument
        if key in self.entries:
            return AlreadyExists
        self.entries[key] = Entry(kind, parent, without_empty(labels))
        return None

    def commit(self, name: str, key: str, parent: str, labels: dict[str, str]) -> type[ContractError] | None:
        if key not in self.entries:
            return NotFound
        if name in self.entries:
            return AlreadyExists
        active = self.entries[key]
        if active.kind != Kind.ACTIVE:
            return FailedPrecondition
        if active.parent and parent and parent != active.parent:
            return InvalidArgument
        parent = active.parent or parent
        if parent and parent not in self.entries:
            return NotFound
        if parent and self.entries[parent].kind != Kind.COMMITTED:
            return FailedPrecondition
        del self.entries[key]
        self.entries[name] = Entry(Kind.COMMITTED, parent, without_empty(labels))
        return None

    def remove(self, name: str) -> type[ContractError] | None:
        if name not in self.entries:
            return NotFound
        if any(entry.parent == name for entry in self.entries.values()):
            return FailedPrecondition
        del self.entries[name]
        return None

    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> type[ContractError] | None:
        if name not in self.entries:
            return NotFound
        if "parent" in paths:
            return InvalidArgument
        changed = dict(self.entries[name].labels)
        for path in paths or ["labels"]:
            key = path.partition(".")[2]
            changed = {**changed, key: labels.get(key, "")} if key else dict(labels)
        self.entries[name].labels = without_empty(changed)
        return None

    def has_layer(self, target: str, parent: str) -> bool:
        return any(
            name.split("/")[0] == target
            and (entry.kind, entry.parent, entry.labels.get(LABEL_TARGET)) == (Kind.COMMITTED, parent, target)
            for name, entry in self.entries.items()
        )


def without_empty(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}


class Calls(RuleBasedStateMachine):
    """Makes a call, and asks the model what must come of it."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="st-"))
        self.model = Model()
        self.layers = ScriptedLayers({})
        self.open()

    def open(self) -> None:
        self.sn = Snapshotter(self.root, SnapshotStore(metadata_path(self.root)), self.layers)

    def teardown(self) -> None:
        if hasattr(self, "sn"):
            self.sn.close()
            shutil.rmtree(self.root)

    def expect(self, error: type[ContractError] | None, method: str, *arguments: Any) -> None:
        if error is None:
            getattr(self.sn, method)(*arguments)
            return
        with pytest.raises(ContractError) as caught:
            getattr(self.sn, method)(*arguments)
        assert type(caught.value) is error

    @rule(key=NAMES, parent=PARENTS, labels=LABELS)
    def prepare(self, key: str, parent: str, labels: dict[str, str]) -> None:
        self.expect(self.model.create(Kind.ACTIVE, key, parent, labels), "prepare", key, parent, labels)

    @rule(key=NAMES, parent=PARENTS, labels=LABELS)
    def view(self, key: str, parent: str, labels: dict[str, str]) -> None:
        self.expect(self.model.create(Kind.VIEW, key, parent, labels), "view", key, parent, labels)

    @rule(name=NAMES, key=NAMES, parent=PARENTS, labels=LABELS)
    def commit(self, name: str, key: str, parent: str, labels: dict[str, str]) -> None:
        self.expect(self.model.commit(name, key, parent, labels), "commit", name, key, labels, parent)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.expect(self.model.remove(name), "remove", name)

    @rule(name=NAMES, labels=LABELS, paths=PATHS)
    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> None:
        self.expect(self.model.update(name, labels, paths), "update", name, labels, paths)

    @rule(key=NAMES, ref=NAMES, parent=PARENTS, answer=ANSWERS)
    def layer(self, key: str, ref: str, parent: str, answer: Provided) -> None:
        self.layers.answers = {ref: answer}
        labels = {LABEL_TARGET: ref}
        arguments = (key, parent, labels, "default")
        if self.model.has_layer(ref, parent) or key in self.model.entries:
            self.expect(AlreadyExists, "prepare", *arguments)
        elif isinstance(answer, Deferred):
            self.expect(self.model.create(Kind.ACTIVE, key, parent, labels), "prepare", *arguments)
        else:
            taken = ref in self.model.entries
            # Which number a second name gets is the snapshotter's affair.
            name = f"{ref}/new" if taken else ref
            error = self.model.create(Kind.COMMITTED, name, parent, labels)
            self.expect(error or AlreadyExists, "prepare", *arguments)
            if taken and error is None:
                (real,) = {info.name for info in self.sn.walk()} - set(self.model.entries)
                assert real.startswith(f"{ref}/")
                self.model.entries[real] = self.model.entries.pop(name)

    @rule()
    def cleanup(self) -> None:
        self.sn.cleanup()
        assert self.directories() == self.sn._store.ids()

    @rule()
    def reopen(self) -> None:
        self.sn.close()
        self.open()

    def directories(self) -> set[int]:
        return {int(name) for name in os.listdir(self.root / "snapshotter/snapshots")}

    @invariant()
    def the_model_is_right(self) -> None:
        found = {
            info.name: Entry(info.kind, info.parent, own_labels(dict(info.labels))) for info in self.sn.walk()
        }
        assert found == {
            name: Entry(entry.kind, entry.parent, own_labels(entry.labels))
            for name, entry in self.model.entries.items()
        }
        assert self.directories() >= self.sn._store.ids()


def own_labels(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key in {"x", "y", LABEL_TARGET}}


@pytest.mark.usefixtures("root")
def test_any_sequence_of_calls() -> None:
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
