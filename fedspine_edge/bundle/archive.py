"""A bundle as one file: an uncompressed zip of its files, for copying to devices in one piece."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fedspine_edge.bundle.bundle import MANIFEST, load_bundle
from fedspine_edge.bundle.publish import writing
from fedspine_edge.errors import CheckpointError, ConfigError

SUFFIX = ".zip"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a file named like a packed bundle."""
    path = Path(path)
    return path.suffix == SUFFIX and not path.is_dir()


def pack(folder: str | Path, out: str | Path) -> Path:
    """Writes a checked bundle as one file, atomically, with every file stored as it is.

    Raises `CheckpointError` for a damaged bundle and `ConfigError` where `out` is another kind of file.
    """
    folder, out = Path(folder), Path(out).absolute()
    check_archive_target(out)
    bundle = load_bundle(folder)
    with writing(out):
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.new-", dir=out.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                # Times are fixed, so the same bundle packs to the same bytes.
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    for member in (MANIFEST, *sorted(bundle.manifest.files)):
                        entry = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
                        entry.external_attr = 0o644 << 16
                        with (
                            (folder / member).open("rb") as source,
                            archive.open(entry, "w", force_zip64=True) as target,
                        ):
                            while piece := source.read(1 << 20):
                                target.write(piece)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(out)
        finally:
            Path(name).unlink(missing_ok=True)
    return out


def check_archive_target(out: Path) -> None:
    """Raises `ConfigError` unless `out` is free or a packed bundle."""
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out} does not end in {SUFFIX}.", remedy=f"Name it {out.name}{SUFFIX}.")
    if out.exists() and not (out.is_file() and _members(out)):
        raise ConfigError(f"{out} exists and is not a packed bundle; it will not be replaced.")


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The files of a packed bundle, none where it is something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile):
        return []
    return members if any(member.filename == MANIFEST for member in members) else []


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Path]:
    """The folder of a bundle, for reading: itself, or where a packed one was unpacked to meanwhile."""
    if not is_archive(path):
        yield Path(path)
        return
    with unpack(path) as folder:
        yield Path(folder)


def unpack(path: str | Path) -> tempfile.TemporaryDirectory[str]:
    """Unpacks into a temporary folder, which the caller removes; `load_bundle` then checks what is in it.

    Raises `CheckpointError` where there is no packed bundle, or one with other things in it than a bundle's files.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist.", remedy="Make one with: fedspine-edge compile MODEL --out x.zip"
        )
    members = _members(path)
    # Stored files are as large as they say: a small file cannot unpack to a huge one.
    odd = [m for m in members if m.compress_type != zipfile.ZIP_STORED or not _NAME.fullmatch(m.filename)]
    if not members or odd or sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is not a packed bundle, or damaged.", remedy="Copy it again, or compile it anew from its model."
        )
    folder = tempfile.TemporaryDirectory(prefix="fedspine-bundle-")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder.name)
    except (OSError, zipfile.BadZipFile) as error:
        folder.cleanup()
        raise CheckpointError(f"{path} cannot be unpacked: {error}.", remedy="Copy it again.") from error
    except BaseException:
        folder.cleanup()
        raise
    return folder
