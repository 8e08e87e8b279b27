"""A program that runs in an image that holds nothing else: it prints the files it is told, or waits for ever (as a pod's
first process does)."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

_SOURCE = """
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
static void end(int number) { (void)number; _exit(0); }
int main(int count, char **names) {
    static char buffer[1 << 16];
    ssize_t got;
    if (count < 2) {
        signal(SIGTERM, end);
        signal(SIGINT, end);
        for (;;) pause();
    }
    for (int i = 1; i < count; i++) {
        int fd = open(names[i], O_RDONLY);
        if (fd < 0) return 2;
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            if (write(1, buffer, got) != got) return 3;
        if (got < 0) return 4;
    }
    return 0;
}
"""


@functools.cache
def cat() -> bytes:
    """Return the program, static, for this machine."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cat"
        command = ["gcc", "-Os", "-static", "-s", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=_SOURCE, text=True, check=True, timeout=120)
        return path.read_bytes()
