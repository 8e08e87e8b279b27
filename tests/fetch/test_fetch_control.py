"""Messages between daemon and fetcher."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest

from snapshotter import messages
from snapshotter.fetch import control
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest
from tests.support.process import open_descriptors

LAYER = Digest("sha256:" + "ab" * 32)
SOURCE = BlobSource("https://host/blob?sig=hush", {"Authorization": "Bearer hush"}, "host", "layer")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = messages.pair()
    with one, other:
        yield one, other


@pytest.mark.parametrize(
    "message",
    [
        control.Open(LAYER, background=True),
        control.Close(LAYER),
        control.Source(LAYER, SOURCE),
        control.NoSource(LAYER, "registry is away", temporary=True),
        control.Opened(LAYER),
        control.Opened(LAYER, "no tree"),
        control.NeedSource(LAYER, renew=True),
        control.Complete(LAYER, verified=False),
    ],
)
def test_what_is_sent_arrives(message: control.Message, pair: tuple[socket.socket, socket.socket]) -> None:
    control.send(pair[0], message)
    assert control.receive(pair[1]) == (message, [])


def test_a_server_socket_travels_with_attach(pair: tuple[socket.socket, socket.socket]) -> None:
    mine, theirs = messages.pair()
    with mine, theirs:
        control.send(pair[0], control.Attach(LAYER), [theirs.fileno()])
        received = control.receive(pair[1])
        assert received is not None
        message, fds = received
        assert message == control.Attach(LAYER)
        with socket.socket(fileno=fds[0]) as copy:
            mine.send(b"x")
            assert copy.recv(10) == b"x"
            assert not os.get_inheritable(copy.fileno())


def test_the_end_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert control.receive(pair[1]) is None


@pytest.mark.parametrize(
    "packet",
    [
        b"no json hush",
        b'["hush"]',
        json.dumps({"op": "open", "layer": "hush", "background": True}).encode(),
        json.dumps({"op": "open", "layer": LAYER, "background": "hush"}).encode(),
        json.dumps({"op": "source", "layer": LAYER, "source": {"url": "hush"}}).encode(),
        json.dumps({"op": "else", "layer": LAYER, "secret": "hush"}).encode(),
        json.dumps({"op": "attach", "layer": LAYER}).encode(),
    ],
)
def test_a_bad_packet_is_refused_without_showing_it(
    packet: bytes, pair: tuple[socket.socket, socket.socket]
) -> None:
    pair[0].send(packet)
    with pytest.raises(ValueError, match=r".") as caught:
        control.receive(pair[1])
    if b"sha256" in packet:
        assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_descriptors_of_a_bad_packet_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    before = open_descriptors()
    read_end, write_end = os.pipe()
    try:
        messages.send(pair[0], {"op": "close", "layer": LAYER}, [read_end])
        with pytest.raises(ValueError, match="descriptors"):
            control.receive(pair[1])
    finally:
        os.close(read_end)
        os.close(write_end)
    assert open_descriptors() == before
