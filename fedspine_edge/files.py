"""Atomic writes, hashes, and the names of well-known files."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

from msgspec import Meta

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 as 64 lower-case hex digits."""

LAYOUT = "layout.json"
"""Description of a saved model. Its presence marks a folder that this package wrote."""

WEIGHTS = "model.safetensors"

GENERATION_CONFIG = "generation_config.json"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's file names of an adapter."""

TOKENIZER = "tokenizer.json"
SENTENCEPIECE_MODELS = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model")
TOKENIZER_VOCABULARIES = (
    TOKENIZER,
    *SENTENCEPIECE_MODELS,
    "vocab.txt",
    "vocab.json",
)
"""Vocabulary files. A folder with at least one of them has a tokenizer."""

TOKENIZER_FILES = (
    *TOKENIZER_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)
"""All files that may belong to a tokenizer. Those that exist are copied with a model."""

_HASHED_PIECE_BYTES = 1 << 20


def write_atomically(path: Path, data: bytes, *, sync: bool) -> None:
    """Write to a temporary file in the same folder, then rename it to `path`.

    Args:
        path: File to write or replace.
        data: New content.
        sync: Whether file and folder are flushed to the disk before returning.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8. Readers see either the old or the new content. Nothing is flushed to the disk."""
    write_atomically(path, text.encode(), sync=False)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 lower-case hex digits. Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def reason_not_to_replace(folder: Path) -> str:
    """Return why an existing folder cannot be replaced by renaming, or an empty string.

    A mount point, such as a volume of a container, cannot be renamed. The current folder would be left without a name.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        return ""
    if is_mount_point(folder):
        return "is a mount point, which cannot be replaced"
    current = Path.cwd()
    return "is in use as the current folder" if folder.resolve() in (current, *current.parents) else ""


def is_mount_point(folder: Path) -> bool:
    """Return whether `folder` is a mount point, including bind mounts of the same file system on Linux."""
    if os.path.ismount(folder):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    # Space, tab, line feed and backslash are escaped as octal numbers in this file.
    points = {
        re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in mounts.splitlines()
    }
    return str(folder.resolve()) in points
