"""A lazy-loading containerd snapshotter for SOCI images."""

__version__ = "0.1.0"
