"""The containerd snapshots contract: store, directories, mounts, and the snapshotter above them.

A snapshot's *key* names it while it is active or a view, its *name* once it is committed; both live in
one key space. Its *id* is the number of its directory and appears nowhere in the contract.
"""
