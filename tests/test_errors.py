"""Every error has an answer: an errno for a reader, a status for containerd, or a reason never to leave.

The tree of errors.py is walked, so that a new leaf cannot be forgotten.
"""

from __future__ import annotations

import inspect
import re

import pytest

from snapshotter import errors
from snapshotter.daemon import service
from snapshotter.daemon.reasons import reason_of
from snapshotter.errors import RegistryError, SnapshotterError
from snapshotter.fuse.operations import ERRNO_OF

NEVER_LEAVE = {
    errors.NoIndex: "Prepare falls back; a log field and a metric label",
    errors.NoZtoc: "Prepare falls back",
    errors.UnsupportedLayer: "Prepare falls back",
    errors.ConfigError: "exit code 78",
    errors.ProcessFailed: "retried, or Prepare falls back, or exit code 1",
    errors.UsageError: "exit code 1 of a command",
}


def below(kind: type[SnapshotterError]) -> set[type[SnapshotterError]]:
    """Return every class below `kind`."""
    direct = {each for each in kind.__subclasses__() if each.__module__ == errors.__name__}
    return direct.union(*map(below, direct))


def leaves() -> list[type[SnapshotterError]]:
    """Return the classes that have no class below them, by name."""
    return sorted(
        (kind for kind in below(SnapshotterError) if not below(kind)), key=lambda kind: kind.__name__
    )


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.__name__)
def test_a_leaf_has_exactly_one_answer(leaf: type[SnapshotterError]) -> None:
    answers = [
        any(issubclass(leaf, kind) for kind, _number in ERRNO_OF),
        leaf in service.STATUS,
        leaf in NEVER_LEAVE,
    ]
    assert answers.count(True) == 1, leaf


def test_the_list_of_those_that_never_leave_holds_leaves_only() -> None:
    assert set(NEVER_LEAVE) <= set(leaves())


def test_the_tables_hold_nothing_that_is_no_error_of_ours() -> None:
    own = {kind for kind, _number in ERRNO_OF if issubclass(kind, SnapshotterError)}
    assert own <= below(SnapshotterError)
    assert set(service.STATUS) <= set(leaves())


def test_every_leaf_has_a_word_for_the_metric() -> None:
    """Of those that a layer may fail with: reasons are few, and none of them is a class name."""
    words = {reason_of(kind("x")) for kind in leaves()}
    assert words == {
        "unsupported-layer", "corrupt-data", "registry-failed", "process-failed", "mount-failed",
    }  # fmt: skip
    assert reason_of(OSError("x")) == "mount-failed"


def test_only_registry_errors_may_pass() -> None:
    temporary = {kind for kind in leaves() if getattr(kind, "temporary", False)}
    assert temporary == {errors.RegistryUnavailable, errors.RegistryTimeout, errors.ShortBody}
    assert all(issubclass(kind, RegistryError) for kind in temporary)


def test_a_server_may_ask_us_to_wait() -> None:
    assert errors.RegistryUnavailable("x", retry_after=3.0).retry_after == 3.0
    assert errors.RegistryUnavailable("x").retry_after is None


def test_the_tree_on_the_screen_is_the_tree() -> None:
    """The module's docstring names every class, and no other."""
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+", errors.__doc__))
    named = {kind.__name__ for kind in below(SnapshotterError)} | {"SnapshotterError"}
    assert named <= drawn | {"Unavailable"}
    assert drawn - named == set()
    assert "Unavailable" in errors.__doc__


def test_every_class_says_what_it_means() -> None:
    for kind in below(SnapshotterError):
        assert inspect.getdoc(kind) not in {None, inspect.getdoc(kind.__mro__[1])}, kind
