"""Download of a round's adapter from retained chunk topics. A restarted device resumes it."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fedspine_edge.errors import BlobError, BrokerUnreachable, TransportError
from fedspine_edge.protocol.chunks import Download
from fedspine_edge.protocol.messages import BlobRef
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.transport.base import Transport

log = logging.getLogger("fedspine_edge.device")

WINDOW = 16
"""Number of chunk topics subscribed to at a time, below the in-flight limit of every broker's default settings."""

MAX_ATTEMPTS = 3
"""Number of downloads of a round whose hash may be wrong before the round fails."""


class AdapterDownload:
    """The blobs of one round at a time.

    Args:
        transport: Transport, connected before chunks are requested.
        topics: Topics of the fleet.
        folder: Folder that keeps chunks, so that a restarted device resumes the download; None keeps them in memory.
        window: Number of chunk topics to subscribe to at a time; None for all.
    """

    def __init__(
        self, transport: Transport, topics: Topics, folder: Path | None = None, *, window: int | None = WINDOW
    ) -> None:
        self._transport = transport
        self._topics = topics
        self._folder = folder
        self._window_size = sys.maxsize if window is None else window
        self._downloads: dict[str, Download] = {}
        self._attempts = 0
        self._window: set[tuple[str, int]] = set()
        self._subscribed: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether chunks are still missing."""
        return not all(download.complete for download in self._downloads.values())

    def start(self, refs: Sequence[BlobRef]) -> None:
        """Start to download other blobs, and delete the chunks of all others from disk. Raises `BlobError`."""
        hashes = tuple(ref.sha256 for ref in refs)
        for path in self._folder.iterdir() if self._folder is not None and self._folder.is_dir() else ():
            if not path.name.startswith(hashes):
                shutil.rmtree(path, ignore_errors=True)
        self._downloads, self._attempts = {ref.sha256: Download(ref, self._folder) for ref in refs}, 0

    def request(self) -> None:
        """Subscribe to the next window of chunks and unsubscribe from the last. Retained chunks arrive at once.

        If the broker does not answer, the request is repeated at the device's next retry.
        """
        try:
            self._subscribe_window()
        except BrokerUnreachable:
            raise
        except TransportError as error:
            log.warning("could not request the adapter: %s", error.message)

    def _subscribe_window(self) -> None:
        if self._subscribed:
            self._transport.unsubscribe(*self._subscribed)
        window: list[tuple[str, int]] = []
        for sha256, download in self._downloads.items():
            window += ((sha256, index) for index in download.missing(self._window_size - len(window)))
        self._window = set(window)
        self._subscribed = tuple(self._topics.blob(sha256, index) for sha256, index in window)
        if self._subscribed:
            self._transport.subscribe(*self._subscribed)

    def add_chunk(self, sha256: str, index: int, payload: bytes) -> bool:
        """Add a chunk, and request the next window after the last one of this. Returns whether it was needed."""
        download = self._downloads.get(sha256)
        if download is None:
            return False
        try:
            download.feed(index, payload)
        except BlobError as error:
            log.warning("ignored a chunk: %s", error.message)
            return False
        self._window.discard((sha256, index))
        if not self._window:
            self.request()
        return True

    def result(self) -> list[bytes] | None:
        """Return the complete blobs, or None if a hash was wrong; that blob is then requested again.

        Raises `BlobError` after `MAX_ATTEMPTS` wrong hashes.
        """
        blobs = []
        for download in self._downloads.values():
            try:
                blobs.append(download.data())
            except BlobError as error:
                self._attempts += 1
                if self._attempts >= MAX_ATTEMPTS:
                    raise
                log.warning("%s", error.message)
                self.request()
                return None
        return blobs

    def stop(self) -> None:
        """Stop the download. Chunks stay on disk, so that a restarted device can resume."""
        self._downloads = {}
        self.request()

    def discard(self) -> None:
        """Stop the download and delete its chunks."""
        for download in self._downloads.values():
            download.discard()
        self.stop()
