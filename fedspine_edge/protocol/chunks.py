"""Blobs in chunks: splitting them, collecting them across restarts, and storing them by content.

A chunk is checked only for its index and length. The blob is trusted once its SHA-256 is the announced one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedspine_edge.errors import BlobError
from fedspine_edge.files import write_atomically
from fedspine_edge.protocol.codec import digest
from fedspine_edge.protocol.messages import CHUNK_BYTES, MAX_BLOB_BYTES, BlobRef

_SHA256 = re.compile(r"[0-9a-f]{64}")


def split(data: bytes, *, chunk_bytes: int = CHUNK_BYTES) -> tuple[BlobRef, list[bytes]]:
    """Return the reference of `data` and its chunks in order; all but the last have `chunk_bytes` bytes."""
    ref = ref_of(data, chunk_bytes=chunk_bytes)
    return ref, [chunk(ref, data, index) for index in range(ref.num_chunks)]


def ref_of(data: bytes, *, chunk_bytes: int = CHUNK_BYTES) -> BlobRef:
    """Return the reference of `data`. Raises `BlobError` when it is too large to be sent."""
    if len(data) > MAX_BLOB_BYTES:
        raise BlobError(f"blob has {len(data):,} bytes; at most {MAX_BLOB_BYTES:,} can be sent.")
    return BlobRef(sha256=digest(data), size_bytes=len(data), chunk_bytes=chunk_bytes)


def chunk(ref: BlobRef, data: bytes, index: int) -> bytes:
    """Return chunk `index` of `data`. Raises `BlobError` when there is no such chunk."""
    _check_index(ref, index)
    return data[index * ref.chunk_bytes : (index + 1) * ref.chunk_bytes]


class Download:
    """Collects the chunks of one blob, in any order and with repetitions.

    Args:
        ref: The announced blob. Nothing is allocated for it in advance.
        directory: Folder in which chunks are kept until `discard`, so that a restarted process continues with them;
            None keeps them in memory.
        max_bytes: Size of the largest accepted blob; the announcement of a larger one raises `BlobError`.
    """

    def __init__(self, ref: BlobRef, directory: str | Path | None = None, *, max_bytes: int = MAX_BLOB_BYTES) -> None:
        if ref.size_bytes > max_bytes:
            raise BlobError(f"blob {ref.sha256[:12]} has {ref.size_bytes:,} bytes; at most {max_bytes:,} are accepted.")
        if not _SHA256.fullmatch(ref.sha256):
            raise BlobError(f"{ref.sha256[:80]!r} is not a SHA-256.")
        self.ref = ref
        self._chunks: dict[int, bytes] = {}
        self._have: set[int] = set()
        self._lowest = 0
        self._folder: Path | None = None
        if directory is not None:
            self._folder = Path(directory) / f"{ref.sha256}-{ref.size_bytes}-{ref.chunk_bytes}.parts"
            self._resume(self._folder)

    @property
    def complete(self) -> bool:
        """Whether all chunks were received."""
        return len(self._have) == self.ref.num_chunks

    @property
    def received(self) -> int:
        """Number of chunks received."""
        return len(self._have)

    def missing(self, limit: int = 16) -> list[int]:
        """Return the lowest missing indices, at most `limit`."""
        while self._lowest in self._have:
            self._lowest += 1
        found: list[int] = []
        for index in range(self._lowest, self.ref.num_chunks):
            if len(found) >= limit:
                break
            if index not in self._have:
                found.append(index)
        return found

    def feed(self, index: int, data: bytes) -> bool:
        """Add one chunk; return False when it was received before.

        Raises `BlobError` when there is no such chunk or its length is wrong; the other chunks are kept.
        """
        _check_index(self.ref, index)
        expected = self._length(index)
        if len(data) != expected:
            raise BlobError(f"chunk {index} of {self.ref.sha256[:12]} has {len(data)} bytes instead of {expected}.")
        if index in self._have:
            return False
        if self._folder is None:
            self._chunks[index] = bytes(data)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Not synced: after a power cut, an incomplete chunk fails the check of its length or of the blob's hash.
            write_atomically(self._folder / str(index), data, sync=False)
        self._have.add(index)
        return True

    def data(self) -> bytes:
        """Return the blob.

        Raises `BlobError` when chunks are missing, or when the blob does not have the announced hash. In the latter
        case all chunks are discarded, and the transfer can start again.
        """
        if not self.complete:
            raise BlobError(
                f"blob {self.ref.sha256[:12]} is incomplete: {self.received} of {self.ref.num_chunks} chunks."
            )
        try:
            blob = b"".join(self._read(index) for index in range(self.ref.num_chunks))
        except OSError as error:
            self.discard()
            raise BlobError(f"chunks of {self.ref.sha256[:12]} cannot be read: {error}.") from error
        if len(blob) != self.ref.size_bytes or digest(blob) != self.ref.sha256:
            self.discard()
            raise BlobError(
                f"blob {self.ref.sha256[:12]} is corrupt: its {len(blob):,} bytes have another SHA-256.",
                remedy="Its chunks were discarded; it will be transferred again.",
            )
        return blob

    def discard(self) -> None:
        """Delete all chunks, in memory and on disk."""
        self._chunks.clear()
        self._have.clear()
        self._lowest = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _length(self, index: int) -> int:
        return min(self.ref.chunk_bytes, self.ref.size_bytes - index * self.ref.chunk_bytes)

    def _read(self, index: int) -> bytes:
        return self._chunks[index] if self._folder is None else (self._folder / str(index)).read_bytes()

    def _resume(self, folder: Path) -> None:
        for path in folder.iterdir() if folder.is_dir() else ():
            index = int(path.name) if path.name.isascii() and path.name.isdecimal() else -1
            valid = 0 <= index < self.ref.num_chunks and path.name == str(index)
            if valid and path.stat().st_size == self._length(index):
                self._have.add(index)
            else:
                path.unlink()


class BlobStore:
    """A folder of blobs, each in a file named by its SHA-256. It detects corruption and survives power loss."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the stored hashes, sorted."""
        return iter(sorted(path.name for path in self.directory.iterdir() if _SHA256.fullmatch(path.name)))

    def path(self, sha256: str) -> Path:
        """Return the file of a blob, which need not exist. Raises `BlobError` unless `sha256` is a SHA-256."""
        if not _SHA256.fullmatch(sha256):
            raise BlobError(f"{sha256[:80]!r} is not a SHA-256.")
        return self.directory / sha256

    def put(self, data: bytes) -> str:
        """Store `data` and return its SHA-256. On return it is synced to the disk."""
        sha256 = digest(data)
        path = self.path(sha256)
        if not (path.is_file() and path.read_bytes() == data):
            write_atomically(path, data, sync=True)
        return sha256

    def get(self, sha256: str) -> bytes:
        """Return a blob. Raises `BlobError` when it is absent or damaged; a damaged file is removed."""
        path = self.path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobError(f"blob {sha256[:12]} is not in {self.directory}.") from None
        except OSError as error:
            raise BlobError(f"blob {path} cannot be read: {error}.") from error
        if digest(data) != sha256:
            path.unlink(missing_ok=True)
            raise BlobError(f"blob {path} was damaged on disk and has been removed.", remedy="It must be sent again.")
        return data

    def prune(self, keep: Iterable[str]) -> int:
        """Remove blobs that are not in `keep` and files of interrupted writes; return the number of removed files."""
        kept = set(keep)
        removed = [path for path in self.directory.iterdir() if path.is_file() and path.name not in kept]
        for path in removed:
            path.unlink(missing_ok=True)
        return len(removed)


def _check_index(ref: BlobRef, index: int) -> None:
    if not 0 <= index < ref.num_chunks:
        raise BlobError(f"blob {ref.sha256[:12]} has {ref.num_chunks} chunks; there is no chunk {index}.")
