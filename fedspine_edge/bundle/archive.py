"""Packed bundles: the files of a bundle in one uncompressed zip file, for copying to devices in one piece."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fedspine_edge.bundle.bundle import MANIFEST, load_bundle
from fedspine_edge.bundle.publish import is_full, temporary_folder_full, writing
from fedspine_edge.errors import CheckpointError, ConfigError

SUFFIX = ".zip"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def is_archive(path: str | Path) -> bool:
    """Return whether `path` is named like a packed bundle and is not a folder."""
    path = Path(path)
    return path.suffix == SUFFIX and not path.is_dir()


def pack(folder: str | Path, out: str | Path) -> Path:
    """Verify a bundle and write it as one uncompressed zip file, atomically.

    Raises:
        CheckpointError: The bundle is damaged.
        ConfigError: `out` exists and is another kind of file.
    """
    folder, out = Path(folder), Path(out).absolute()
    check_archive_target(out)
    bundle = load_bundle(folder)
    with writing(out):
        descriptor, name = tempfile.mkstemp(prefix=f".{out.name}.new-", dir=out.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                # Timestamps are fixed so that the same bundle always packs to the same bytes.
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
    """Raise `ConfigError` unless `out` does not exist or is a packed bundle."""
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out} does not end in {SUFFIX}.", remedy=f"Name it {out.name}{SUFFIX}.")
    if out.exists() and not (out.is_file() and _members(out)):
        raise ConfigError(
            f"{out} exists and is not a packed bundle; it will not be replaced.", remedy="Choose another output file."
        )


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a packed bundle, or an empty list if `path` is something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile):
        return []
    return members if any(member.filename == MANIFEST for member in members) else []


@contextlib.contextmanager
def bundle_folder(path: str | Path) -> Iterator[Path]:
    """Yield the folder of a bundle for reading; a packed bundle is unpacked to a temporary folder for the block."""
    if not is_archive(path):
        yield Path(path)
        return
    with unpack(path) as folder:
        yield Path(folder)


def unpack(path: str | Path) -> tempfile.TemporaryDirectory[str]:
    """Unpack a bundle into a temporary folder, which the caller removes.

    The content is not verified; `load_bundle` does that. Raises `CheckpointError` if `path` is not a packed bundle or
    contains anything but the files of a bundle, and `DeployError` if the temporary folder is full.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist.", remedy="Create one with: fedspine-edge compile MODEL --out x.zip"
        )
    members = _members(path)
    # Uncompressed members cannot expand, so a small file cannot unpack to a huge one.
    unexpected = [m for m in members if m.compress_type != zipfile.ZIP_STORED or not _NAME.fullmatch(m.filename)]
    if not members or unexpected or sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is not a packed bundle, or it is damaged.", remedy="Copy it again, or recompile it from its model."
        )
    folder = tempfile.TemporaryDirectory(prefix="fedspine-bundle-")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder.name)
    except (OSError, zipfile.BadZipFile) as error:
        folder.cleanup()
        if is_full(error):
            raise temporary_folder_full(error) from error
        raise CheckpointError(f"{path} cannot be unpacked: {error}.", remedy="Copy it again.") from error
    except BaseException:
        folder.cleanup()
        raise
    return folder
