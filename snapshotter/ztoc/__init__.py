"""The zTOC format as a pure package: bytes in, values out; no I/O, no clock, no async, no logging.

    model         the values: FileEntry, CompressionInfo, Ztoc
    parse         serialized zTOC -> Ztoc; every invariant, once, over all elements
    serialize     Ztoc -> bytes, byte for byte what the reference writer produces
    flatbuffers   the reader and writer of the container format that both stand on
    zinfo         the checkpoint blob inside a zTOC (gzip v1/v2, uncompressed)
    spans         geometry: which bytes of the blob hold which bytes of the tar
    inflate       one span from its checkpoint; whole layers as a stream
    tar           tar headers as Go's archive/tar reads them, because its reading decides the digest
    checkpoints   the scan of a gzip stream for places where inflating can start
    build         layer stream -> zTOC, in one pass

Everything here may be called from any thread; nothing is shared between calls.
"""
