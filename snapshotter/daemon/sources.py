"""Where blobs are: each layer's references, and the URL behind the registry's redirect.

A layer may be known from several images; when one repository refuses (its token expired, it was deleted),
the next is asked. The fetcher sees first what a mirror really sends, and complains here.

Concurrency: trio; the registry client keeps one answer per blob, and asks once however many ask.
"""

from __future__ import annotations

import logging

from snapshotter.daemon.phases import Phase, Phases
from snapshotter.errors import BlobNotFound, RegistryError, RegistryUnavailable, SpanDigestMismatch
from snapshotter.fetch import control
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest

_log = logging.getLogger(__name__)


class BlobSources:
    """Finds the source of a layer's blob."""

    def __init__(self, client: RegistryClient, phases: Phases) -> None:
        self._client = client
        self._phases = phases
        self._images: dict[Digest, dict[str, Reference]] = {}

    def learn(self, layer: Digest, image: Reference) -> None:
        """Note that `image` has `layer`; what was learned last is asked first."""
        known = self._images.setdefault(layer, {})
        known.pop(image.locator, None)
        known[image.locator] = image

    def forget(self, layer: Digest) -> None:
        """Forget a layer that nothing uses."""
        self._images.pop(layer, None)

    async def answer(self, question: control.NeedSource) -> BlobSource:
        """Return where the blob is that the fetcher asks for, once its complaint is noted. Raises RegistryError."""
        if question.mirror:
            what = f"blob {question.layer}: {question.mirror}"
            lied = question.complaint == control.LIED
            error = (
                SpanDigestMismatch(f"{what} sent bytes of another digest")
                if lied
                else RegistryUnavailable(f"{what} did not give a range")
            )
            self._client.blame(question.mirror, error)
        return await self.find(question.layer, renew=question.renew)

    async def find(self, layer: Digest, *, renew: bool) -> BlobSource:
        """Return where the blob is. Raises RegistryError: what the last repository said."""
        failure: RegistryError = BlobNotFound(f"no image is known that has layer {layer}")
        for image in reversed(tuple(self._images.get(layer, {}).values())):
            try:
                with self._phases.timed(Phase.SOURCE, layer):
                    return await self._client.blob_source(image, layer, renew=renew)
            except RegistryError as error:
                _log.warning(
                    "a repository does not give a layer",
                    extra={"layer": layer, "repository": image.locator, "error": str(error)},
                )
                failure = error
        raise failure
