"""`soci-snapshotter-grpc install-check`: what this host has, what it lacks, and how to mend it.

    finding     what a check says; how findings are shown
    host        kernel, devices, limits, disk, service
    runtime     containerd: its version, and what its configuration says of us
    reference   what a former installation of the reference snapshotter has left
    command     all of them, in order

Nothing is changed, mounted or stopped. Each module judges facts that are handed to it and has one function that
gathers them.
"""

from snapshotter.daemon.install.command import install_check

__all__ = ["install_check"]
