"""Options from the daemon."""

from __future__ import annotations

import json
import os

import pytest

from snapshotter.errors import ConfigError
from snapshotter.fetch.options import Options


def test_nothing_given_means_the_defaults() -> None:
    assert Options.from_json("{}") == Options()
    assert Options().worker_count() == min(len(os.sched_getaffinity(0)), 8)


def test_given_values_are_taken_and_a_whole_number_is_a_time_too() -> None:
    options = Options.from_json(json.dumps({"read_budget_s": 5, "workers": 3, "log_level": "debug"}))
    assert options.read_budget_s == 5
    assert options.worker_count() == 3
    assert options.log_level == "debug"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"read_budget": 5}', "read_budget"),
        ('{"workers": "3"}', "workers"),
        ('{"workers": true}', "workers"),
        ('{"workers": -1}', "workers"),
        ('{"read_budget_s": 0}', "read_budget_s"),
        ('{"read_budget_s": true}', "read_budget_s"),
        ('{"memory_bytes": 0}', "memory_bytes"),
        ('{"background_connections": 0}', "background_connections"),
    ],
)
def test_a_wrong_option_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Options.from_json(text)
