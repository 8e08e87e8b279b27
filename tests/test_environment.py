"""What our children have of the daemon's environment."""

from __future__ import annotations

import pytest

from snapshotter.environment import child_environment

DAEMONS = {
    "PATH": "/usr/bin",
    "LC_ALL": "C",
    "PYTHONPATH": "/x",
    "JOURNAL_STREAM": "8:1",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "NOTIFY_SOCKET": "/run/systemd/notify",
    "LISTEN_FDS": "1",
    "HTTPS_PROXY": "http://user:secret@proxy",
    "no_proxy": "localhost",
    "SSL_CERT_FILE": "/ca.pem",
    "DOCKER_CONFIG": "/root/.docker",
    "MY_PATH": "secret",
}


def test_a_child_gets_what_it_needs_and_no_secret() -> None:
    assert child_environment(DAEMONS).keys() == {"PATH", "LC_ALL", "PYTHONPATH", "JOURNAL_STREAM"}


def test_who_fetches_gets_the_way_to_the_network_too() -> None:
    more = child_environment(DAEMONS, network=True).keys() - child_environment(DAEMONS).keys()
    assert more == {"HTTPS_PROXY", "no_proxy", "SSL_CERT_FILE"}


def test_by_default_it_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_TEST", "here")
    assert child_environment()["LC_TEST"] == "here"
