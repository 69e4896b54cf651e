"""Fetching the round's adapter: windows of retained chunk topics, resumable across restarts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from fedspine_edge.device.state import Tensors
from fedspine_edge.errors import BlobError, BrokerUnreachable, TransportError
from fedspine_edge.transport.base import Transport
from fedspine_edge.wire.codec import check_tensors, unpack
from fedspine_edge.wire.messages import BlobRef
from fedspine_edge.wire.topics import Topics
from fedspine_edge.wire.transfer import Download

log = logging.getLogger("fedspine_edge.device")

WINDOW = 16
"""Chunk topics subscribed to at a time: below the in-flight limit of every broker's default."""

MAX_ATTEMPTS = 3
"""Times a blob whose hash is wrong is fetched anew before that is an error."""


class Fetch:
    """One blob of the fleet at a time.

    Args:
        transport: Connected when chunks are asked for.
        topics: The fleet's.
        folder: Where chunks are kept, so that a restarted device goes on where it stopped.
    """

    def __init__(self, transport: Transport, topics: Topics, folder: Path) -> None:
        self._transport = transport
        self._topics = topics
        self._folder = folder
        self._download: Download | None = None
        self._attempts = 0
        self._window: set[int] = set()
        self._asked: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether chunks are still missing."""
        return self._download is not None and not self._download.complete

    def begin(self, ref: BlobRef) -> None:
        """Turn to another blob; the chunks of any other on the disk are deleted. Raises `BlobError`."""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if not path.name.startswith(ref.sha256):
                shutil.rmtree(path, ignore_errors=True)
        self._download, self._attempts = Download(ref, self._folder), 0

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
        download = self._download
        self._window = set() if download is None else set(download.missing(WINDOW))
        self._asked = tuple(
            self._topics.blob(download.ref.sha256, index) for index in sorted(self._window) if download is not None
        )
        if self._asked:
            self._transport.subscribe(*self._asked)

    def feed(self, sha256: str, index: int, payload: bytes) -> bool:
        """Take a chunk; True when it is one of this blob's. After the last of a window the next is asked for."""
        if self._download is None or sha256 != self._download.ref.sha256:
            return False
        try:
            self._download.feed(index, payload)
        except BlobError as error:
            log.warning("ignored a chunk: %s", error.message)
            return False
        self._window.discard(index)
        if not self._window:
            self.ask()
        return True

    def take(self) -> Tensors | None:
        """The blob's tensors; None after a wrong hash, when it is fetched anew.

        Raises `BlobError` when it was wrong `MAX_ATTEMPTS` times, or right but not a round's adapter.
        """
        assert self._download is not None  # begin comes first
        try:
            data = self._download.data()
        except BlobError as error:
            self._attempts += 1
            if self._attempts >= MAX_ATTEMPTS:
                raise
            log.warning("%s", error.message)
            self.ask()
            return None
        tensors = unpack(data)
        check_tensors(tensors, "round")
        return tensors

    def stop(self) -> None:
        """Forget the blob; its chunks stay on the disk for a restart."""
        self._download = None
        self.ask()

    def discard(self) -> None:
        """Forget the blob and delete its chunks."""
        if self._download is not None:
            self._download.discard()
        self.stop()
