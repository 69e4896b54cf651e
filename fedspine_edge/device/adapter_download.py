"""Fetching the round's adapter: windows of retained chunk topics, resumable across restarts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedspine_edge.errors import BlobError, BrokerUnreachable, TransportError
from fedspine_edge.protocol.chunks import Download
from fedspine_edge.protocol.codec import check_tensors, unpack
from fedspine_edge.protocol.messages import BlobRef
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.training.state_dir import Tensors
from fedspine_edge.transport.base import Transport

log = logging.getLogger("fedspine_edge.device")

WINDOW = 16
"""Chunk topics subscribed to at a time: below the in-flight limit of every broker's default."""

MAX_ATTEMPTS = 3
"""Wrong hashes of a round's blobs, which are then fetched anew, before that is an error."""


class AdapterDownload:
    """The blobs of one round at a time.

    Args:
        transport: Connected when chunks are asked for.
        topics: The fleet's.
        folder: Where chunks are kept, so that a restarted device goes on where it stopped.
    """

    def __init__(self, transport: Transport, topics: Topics, folder: Path) -> None:
        self._transport = transport
        self._topics = topics
        self._folder = folder
        self._downloads: dict[str, Download] = {}
        self._attempts = 0
        self._window: set[tuple[str, int]] = set()
        self._asked: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether chunks are still missing."""
        return not all(download.complete for download in self._downloads.values())

    def begin(self, refs: Sequence[BlobRef]) -> None:
        """Turn to other blobs; the chunks of any other on the disk are deleted. Raises `BlobError`."""
        wanted = tuple(ref.sha256 for ref in refs)
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if not path.name.startswith(wanted):
                shutil.rmtree(path, ignore_errors=True)
        self._downloads, self._attempts = {ref.sha256: Download(ref, self._folder) for ref in refs}, 0

    def ask(self) -> None:
        """Subscribe to the next window of chunks and to nothing else; what is retained is delivered at once.

        A broker that is away or does not answer is asked again at the agent's next retry.
        """
        try:
            self._ask()
        except BrokerUnreachable:
            raise
        except TransportError as error:
            log.warning("could not ask for the adapter: %s", error.message)

    def _ask(self) -> None:
        if self._asked:
            self._transport.unsubscribe(*self._asked)
        window: list[tuple[str, int]] = []
        for sha256, download in self._downloads.items():
            window += ((sha256, index) for index in download.missing(WINDOW - len(window)))
        self._window = set(window)
        self._asked = tuple(self._topics.blob(sha256, index) for sha256, index in window)
        if self._asked:
            self._transport.subscribe(*self._asked)

    def feed(self, sha256: str, index: int, payload: bytes) -> bool:
        """Take a chunk; True when it is one that was wanted. After the last of a window the next is asked for."""
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
            self.ask()
        return True

    def take(self) -> list[Tensors] | None:
        """The tensors of every blob; None after a wrong hash, when that blob is fetched anew.

        Raises `BlobError` when a hash was wrong `MAX_ATTEMPTS` times, or right for what is no part of a round.
        """
        found = []
        for download in self._downloads.values():
            try:
                data = download.data()
            except BlobError as error:
                self._attempts += 1
                if self._attempts >= MAX_ATTEMPTS:
                    raise
                log.warning("%s", error.message)
                self.ask()
                return None
            tensors = unpack(data)
            check_tensors(tensors, "round")
            found.append(tensors)
        return found

    def stop(self) -> None:
        """Forget the blobs; their chunks stay on the disk for a restart."""
        self._downloads = {}
        self.ask()

    def discard(self) -> None:
        """Forget the blobs and delete their chunks."""
        for download in self._downloads.values():
            download.discard()
        self.stop()
