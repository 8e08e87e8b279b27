"""The fetcher: one process that owns span states, cache files, connections to blobs, and what goes first."""
