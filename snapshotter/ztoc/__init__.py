"""The zTOC format as a pure package: bytes in, values out; no I/O, no clock, no async, no logging.

    model         the values: FileEntry, CompressionInfo, Ztoc
    spans         geometry: which bytes of the blob hold which bytes of the tar
    parse         serialized zTOC -> Ztoc; every invariant, once, over all elements
      entries       its list of files, the part that has to be fast
    serialize     Ztoc -> bytes, byte for byte what the reference writer produces
    zinfo         the checkpoint blob inside a zTOC (gzip v1/v2, uncompressed)
    flatbuffers   reader and writer of the container that all of them stand on
    inflate       one span from its checkpoint; whole layers as a stream
    build         layer stream -> zTOC, in one pass, out of
      tar           the tar stream as Go's archive/tar reads it, because its reading decides the digest
        tarheader     one header block
        pax           extended headers and sparse maps
      checkpoints   the scan of a gzip stream for places where inflating can start
        blockinflate  zlib's inflate that stops at block borders

Everything here may be called from any thread; an object belongs to one thread at a time. What calls
share are loaded libraries and caches of pure functions.
"""
