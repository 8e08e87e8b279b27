"""Programs that answer with credentials: run with a limit, ended with everything they started, never quoted.

Concurrency: trio. What a program prints may be a secret: neither stdout nor stderr goes into a message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

import trio

from snapshotter.errors import AuthenticationFailed


async def run_program(
    command: Sequence[str],
    *,
    what: str,
    about: str,
    timeout: float,  # noqa: ASYNC109  it ends the process, not only the wait
    stdin: bytes = b"",
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Return how `command` ended and what it printed. `what` and `about` are for messages.

    Raises AuthenticationFailed when it cannot be run, or has not ended within `timeout` seconds.
    """
    try:
        with trio.fail_after(timeout):
            return await trio.run_process(
                list(command),
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environ,
                # A group of its own, so that what the program started ends with it.
                start_new_session=True,
                deliver_cancel=_kill_group,
            )
    except trio.TooSlowError:
        raise AuthenticationFailed(f"{what}: no answer for {about} within {timeout:g} s") from None
    except OSError as error:
        raise AuthenticationFailed(f"{what}: cannot be run: {error.strerror}") from None


async def _kill_group(process: trio.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
