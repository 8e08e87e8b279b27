"""Messages between a layer server and the fetcher."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.layer.wire import PACKET_SIZE, Failed, Message, Ready, Touch, Want, decode, encode

SPANS = st.integers(0, (1 << 32) - 1)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    first, end, ahead = sorted(draw(st.lists(SPANS, min_size=3, max_size=3)))
    first, end, ahead = (first - 1, end, ahead) if first == end and first else (first, end, ahead)
    choices = [Touch(first), Failed(first, draw(st.integers(1, 4095)))]
    if first < end:
        choices += [Want(first, end, ahead), Ready(first, end)]
    return draw(st.sampled_from(choices))


@given(messages())
def test_round_trip(message: Message) -> None:
    packet = encode(message)
    assert len(packet) == PACKET_SIZE
    decoded = decode(packet)
    assert decoded == message
    assert type(decoded) is type(message)


@given(st.binary(max_size=20) | st.binary(min_size=16, max_size=16))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    try:
        message = decode(data)
    except ValueError:
        return
    assert encode(message) == data


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 1, 2, 3),
        (5, 1, 2, 3),
        (1, 2, 2, 3),
        (1, 2, 3, 2),
        (2, 1, 1, 0),
        (2, 1, 0, 1),
        (3, 2, 1, 0),
        (3, 2, 2, 0),
        (3, 1, 2, 1),
        (4, 1, 0, 0),
        (4, 1, 4096, 0),
        (4, 1, 5, 1),
    ],
    ids=str,
)
def test_packets_that_break_a_rule(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"unknown message kind|padding|first < end|empty range|errno"):
        decode(struct.pack("<4I", *numbers))


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_packets_of_another_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"message of {size} bytes"):
        decode(bytes(size))


@pytest.mark.parametrize(
    "message",
    [Want(2, 2, 2), Want(2, 3, 2), Ready(3, 3), Failed(1, 0), Touch(-1), Touch(1 << 32), Ready(0, 1 << 32)],
)
def test_messages_that_break_a_rule_are_not_sent(message: Message) -> None:
    with pytest.raises(ValueError, match=type(message).__name__.lower() + "|does not fit"):
        encode(message)
