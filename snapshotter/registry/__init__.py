"""Talking to registries: keychains, the API client, and ranged reads of blobs."""
