"""The scan of a gzip stream for checkpoints: places where inflating can start, about one per span.

A checkpoint can be where a deflate block begins. The scan inflates the whole stream and takes the
first such place, and then each one that is more than the span size of output behind the one taken
before. Behind a member header is such a place too, and offsets go on counting over members. The
outcome does not depend on how the stream is cut into chunks, nor on the library that inflates.

Two habits of older builders are not ours: to stop at the end of the first member (what follows
would be lost), and to take several checkpoints at output offset 0 (their spans would be empty).

Damage (a wrong checksum or length, truncation, anything behind the last member that is not another
member) raises InvalidTar: such a blob is no tar+gzip layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from snapshotter.errors import InvalidTar
from snapshotter.ztoc.blockinflate import BlockInflater, Stop
from snapshotter.ztoc.model import Buffer
from snapshotter.ztoc.zinfo import WINDOW_SIZE

OUTPUT_SIZE = 1 << 20
"""Bytes of output per call of the sink; between 256 KiB and 2 MiB no difference in speed can be measured."""


class Point(NamedTuple):
    """A checkpoint with its window (32768 bytes, see zinfo.Checkpoint for the numbers)."""

    compressed_in: int
    uncompressed_out: int
    bits: int
    window: bytes


class CheckpointScanner:
    """Push scanner over a gzip stream: `feed` its chunks, then `close`; use it as a context manager.

    The uncompressed stream goes to `sink` in pieces. There are two output buffers that are used in
    turn: the view that the sink gets stays valid until the sink has returned from its next call. Its
    bytes must not be changed. One thread at a time.
    """

    def __init__(
        self, span_size: int, sink: Callable[[memoryview], object], *, backend: str | None = None
    ) -> None:
        """Take checkpoints more than `span_size` bytes apart; `backend` is one of blockinflate.BACKENDS."""
        self._span_size = span_size
        self._sink = sink
        self._inflater = BlockInflater(backend)
        # The head of a buffer has the end of the output before it, so that a window is one slice.
        self._buffers = [bytearray(WINDOW_SIZE + OUTPUT_SIZE) for _ in range(2)]
        self._rooms = [(ctypes.c_char * OUTPUT_SIZE).from_buffer(one, WINDOW_SIZE) for one in self._buffers]
        self._output_start = 0
        """Stream offset of the first byte of output in the current buffer, the first one, behind its head."""
        self._room_end = 0
        """How much of the current buffer the inflater may fill."""
        self._input_start = 0
        self._next_point = 0
        """The least output offset of the next checkpoint."""
        self._seeking = True
        """Whether the inflater has to stop at borders."""
        self._member_ended = False
        self._give_room(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inflater.close()

    def feed(self, chunk: Buffer) -> list[Point]:
        """Inflate the next bytes of the blob and return the checkpoints found in them.

        A chunk is copied unless it is of type bytes; it should not be larger than some MiB. Raises
        InvalidTar, and whatever the sink raises.
        """
        data = chunk if isinstance(chunk, bytes) else bytes(chunk)
        inflater = self._inflater
        inflater.set_input(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0, len(data))
        points: list[Point] = []
        while inflater.input_left or not self._member_ended:
            if self._member_ended:
                inflater.next_member()
                self._member_ended = False
            stop = inflater.run(borders=self._seeking)
            if stop is Stop.BORDER and self._position >= self._next_point:
                points.append(self._point(self._input_start + len(data) - inflater.input_left))
                self._give_room(self._used)
            self._member_ended = stop is Stop.MEMBER_END
            if not inflater.room_left:
                self._take_output()
            elif stop is Stop.STARVED:
                break
        self._input_start += len(data)
        return points

    def close(self) -> None:
        """Say that the blob ends here, and give the rest of the output to the sink.

        Raises InvalidTar when the blob ends within a member, and whatever the sink raises.
        """
        if not self._member_ended:
            raise InvalidTar(f"gzip stream ends at {self._input_start}, in the middle of a member")
        self._sink(memoryview(self._buffers[0])[WINDOW_SIZE : WINDOW_SIZE + self._used])

    @property
    def _used(self) -> int:
        """Bytes of output in the current buffer."""
        return self._room_end - self._inflater.room_left

    @property
    def _position(self) -> int:
        return self._output_start + self._used

    def _point(self, compressed_in: int) -> Point:
        out = self._position
        self._next_point = out + self._span_size + 1
        end_of_window = WINDOW_SIZE + self._used
        window = bytes(memoryview(self._buffers[0])[end_of_window - WINDOW_SIZE : end_of_window])
        return Point(compressed_in, out, self._inflater.unused_bits, window)

    def _take_output(self) -> None:
        """Go on where the room has been filled."""
        used = self._used
        if used == OUTPUT_SIZE:
            self._turn_buffers()
            used = 0
        self._give_room(used)

    def _turn_buffers(self) -> None:
        full = memoryview(self._buffers[0])
        self._sink(full[WINDOW_SIZE:])
        self._buffers.reverse()
        self._rooms.reverse()
        self._buffers[0][:WINDOW_SIZE] = full[-WINDOW_SIZE:]
        self._output_start += OUTPUT_SIZE

    def _give_room(self, used: int) -> None:
        """Let the inflater go on behind `used` bytes of the current buffer.

        It stops a byte before the next checkpoint may be: a border right there would else have been passed when it
        stops for want of room.
        """
        short = self._next_point - 1 - self._output_start - used
        self._seeking = short <= 0
        self._room_end = OUTPUT_SIZE if self._seeking else min(used + short, OUTPUT_SIZE)
        self._inflater.set_output(ctypes.addressof(self._rooms[0]) + used, self._room_end - used)
