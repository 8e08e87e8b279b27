"""A small typed client of containerd: content, images, leases, snapshots, diff and introspection.

Synchronous; foreign errors are translated here once, and gRPC types do not leave this package.
"""
