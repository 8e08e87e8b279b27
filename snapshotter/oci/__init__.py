"""OCI and Docker image formats: references, descriptors, manifests, platforms.

Pure: bytes in, values out. No I/O, no clock, no logging.
"""
