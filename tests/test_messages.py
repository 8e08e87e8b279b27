"""Messages with descriptors between our processes."""

from __future__ import annotations

import os
import socket

import pytest

from snapshotter import messages


def test_a_message_and_its_descriptors_arrive() -> None:
    near, far = messages.pair()
    reading, writing = os.pipe()
    with near, far:
        messages.send(near, {"op": "put", "n": 1}, [writing])
        received = messages.receive(far)
    assert received is not None
    message, fds = received
    assert message == {"op": "put", "n": 1}
    os.write(fds[0], b"x")
    assert os.read(reading, 1) == b"x"
    assert not os.get_inheritable(fds[0])
    for fd in (reading, writing, *fds):
        os.close(fd)


def test_messages_keep_their_borders() -> None:
    near, far = messages.pair()
    with near, far:
        for number in range(3):
            messages.send(near, {"n": number})
        assert [messages.receive(far) for _ in range(3)] == [({"n": n}, []) for n in range(3)]


def test_the_end_is_none() -> None:
    near, far = messages.pair()
    near.close()
    with far:
        assert messages.receive(far) is None


@pytest.mark.parametrize("packet", [b"{", b"[1]", b'"text"', b"\xff\xfe", b"1"])
def test_a_packet_that_is_no_object_is_refused(packet: bytes) -> None:
    near, far = messages.pair()
    with near, far:
        near.send(packet)
        with pytest.raises(ValueError, match=r"."):
            messages.receive(far)


def test_descriptors_of_a_refused_packet_are_closed() -> None:
    near, far = messages.pair()
    reading, writing = os.pipe()
    with near, far:
        socket.send_fds(near, [b"["], [writing])
        os.close(writing)
        with pytest.raises(ValueError, match=r"."):
            messages.receive(far)
    assert os.read(reading, 1) == b""  # no copy of the writing end is left
    os.close(reading)


def test_a_message_beyond_the_limit_is_refused_before_it_is_sent() -> None:
    near, far = messages.pair()
    with near, far:
        with pytest.raises(ValueError, match="is over"):
            messages.send(near, {"text": "x" * messages.MAX_MESSAGE})
        messages.send(near, {"text": "x" * (messages.MAX_MESSAGE - 20)})
        assert messages.receive(far) is not None


def test_too_many_descriptors_are_refused_and_closed() -> None:
    near, far = messages.pair()
    reading, writing = os.pipe()
    with near, far:
        messages.send(near, {}, [writing] * (messages.MAX_FDS + 4))
        os.close(writing)
        with pytest.raises(ValueError, match="truncated"):
            messages.receive(far)
    assert os.read(reading, 1) == b""
    os.close(reading)
