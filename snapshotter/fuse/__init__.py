"""Lazy layers as FUSE mounts: mounting, keeping, adopting, serving."""
