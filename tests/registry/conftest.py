"""Registries that close after the test, whose log records are then searched for secrets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.registry import Registry
from tests.support.tls import Certificate, make_certificate

StartRegistry = Callable[..., Registry]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[StartRegistry]:
    """Start a registry with Registry's arguments; no record at any level may show one of its secrets."""
    started: list[Registry] = []
    caplog.set_level(logging.DEBUG)
    with ExitStack() as stack:

        def start_registry(**options: Any) -> Registry:
            started.append(stack.enter_context(Registry(**options)))
            return started[-1]

        yield start_registry
    texts = [f"{record.getMessage()} {record.__dict__}" for record in caplog.get_records("call")]
    for registry in started:
        registry.assert_no_secret(*texts)


@pytest.fixture
def docker_config(tmp_path: Path) -> Path:
    return tmp_path / "docker" / "config.json"
