"""Atomic publication of a bundle.

A bundle is written beside its destination, sealed with hashes, flushed to disk and renamed into place. A failed or
interrupted build therefore leaves an existing bundle unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fedspine_edge.bundle.bundle import MANIFEST, BundleManifest, FileEntry, digest_of, is_bundle
from fedspine_edge.errors import ConfigError, DeployError, FedspineError
from fedspine_edge.files import reason_not_to_replace, sha256_of_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


@contextlib.contextmanager
def staging(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that replaces `out` when the block succeeds. The block must call `seal`.

    If the block raises, the temporary folder is deleted and `out` is unchanged.

    Raises:
        ConfigError: `out` exists and is neither a bundle nor an empty folder.
        DeployError: The file system is full or read-only.
    """
    out = Path(out).absolute()
    check_target(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        try:
            folder.chmod(0o755)  # mkdtemp creates private folders, but a service user must be able to read the bundle
            yield folder
            if not is_bundle(folder):
                raise RuntimeError("The block of staging() did not call seal(), so the bundle has no bundle.json.")
            _publish(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise `DeployError` if the block, which writes files for `out`, finds the file system full or read-only."""
    try:
        yield
    except FedspineError:
        raise
    except Exception as error:  # some libraries wrap the operating system's error in their own
        unwritable = isinstance(error, OSError) and error.errno in _UNWRITABLE
        if not unwritable and not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        if is_full(error) and _temporary_folder_is_full(error, out):
            raise temporary_folder_full(error) from error
        raise DeployError(
            f"{out} cannot be written: {error}.",
            remedy="Check free space and permissions, or choose another output path.",
        ) from error


def is_full(error: BaseException) -> bool:
    """Return whether an error means that a file system is full."""
    code = error.errno if isinstance(error, OSError) else None
    return code in _FULL or any(os.strerror(code) in str(error) for code in _FULL)


def temporary_folder_full(error: BaseException) -> DeployError:
    """Return the exception for a full temporary folder."""
    return DeployError(
        f"The temporary folder {tempfile.gettempdir()} is full: {error}.",
        remedy="Free space there, or set the environment variable TMPDIR to another folder.",
    )


def _temporary_folder_is_full(error: BaseException, out: Path) -> bool:
    """Return whether a full file system is that of temporary files and not that of `out`.

    Some errors name the file. For others, the file system with less free space is the full one.
    """
    temporary = Path(tempfile.gettempdir()).absolute()
    named = getattr(error, "filename", None)
    if isinstance(named, (str, bytes)):
        path = Path(os.fsdecode(named)).absolute()
        return temporary in path.parents and out.parent not in path.parents
    target = next((folder for folder in out.absolute().parents if folder.is_dir()), temporary)
    if temporary.stat().st_dev == target.stat().st_dev:
        return False
    return shutil.disk_usage(temporary).free < shutil.disk_usage(target).free


def check_target(out: Path) -> None:
    """Raise `ConfigError` unless `out` does not exist, or is an empty folder or a bundle that can be replaced."""
    out = out.absolute()
    if reason := reason_not_to_replace(out):
        raise ConfigError(
            f"{out} {reason}; nothing was written.", remedy=f"Choose a folder in it, such as {out / 'bundle'}."
        )
    if out.is_dir() and not out.is_symlink() and (is_bundle(out) or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists and is not a bundle; it will not be replaced.", remedy="Choose another output folder."
        )


def seal(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Hash every file in `folder`, write bundle.json, and flush everything to disk. Return the final manifest."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        path.chmod(0o644)  # some libraries create private files, but a service user must be able to read the bundle
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    manifest = msgspec.structs.replace(manifest, files=files)
    manifest = msgspec.structs.replace(manifest, digest=digest_of(manifest))
    with (folder / MANIFEST).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2))
        file.flush()
        os.fsync(file.fileno())
    (folder / MANIFEST).chmod(0o644)
    return manifest


def _publish(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. An existing bundle is moved aside first and is restored if the rename fails."""
    if not out.exists():
        folder.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        previous = aside / out.name
        out.rename(previous)
        try:
            folder.rename(out)
        except BaseException:
            previous.rename(out)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
