"""Whole blobs from a registry, in parallel ranges, into containerd's content store or a file."""
