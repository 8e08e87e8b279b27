"""A small typed client of containerd: content, images, leases, snapshots, diff and introspection.

Synchronous; foreign errors are translated here once, and gRPC types do not leave this package.
"""

from typing import Final

DEFAULT_ADDRESS: Final = "/run/containerd/containerd.sock"
DEFAULT_NAMESPACE: Final = "default"
