"""Writing a bundle: beside its destination, sealed with hashes, flushed to the disk and renamed into place.

So a failed or interrupted build leaves an existing bundle as it was.
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
from fedspine_edge.files import sha256_of_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


@contextlib.contextmanager
def staging(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and is sealed.

    When the block raises, the temporary folder goes and `out` stays as it was. An `out` that exists and is
    neither a bundle nor empty is refused (`ConfigError`): it is not ours to replace. A place that is full or
    read-only is a `DeployError`.
    """
    out = Path(out).absolute()
    check_target(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        try:
            folder.chmod(0o755)  # mkdtemp makes it private; a service user must be able to read the bundle
            yield folder
            if not is_bundle(folder):
                raise RuntimeError("staging() ended without seal(): a bundle without bundle.json would be published.")
            _publish(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises `DeployError` where what the block writes for `out` meets a place that is full or read-only."""
    try:
        yield
    except FedspineError:
        raise
    except Exception as error:  # some libraries wrap the system's error into one of their own
        unwritable = isinstance(error, OSError) and error.errno in _UNWRITABLE
        if not unwritable and not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        raise DeployError(
            f"{out} cannot be written: {error}.", remedy="Check space and permissions, or choose another place."
        ) from error


def check_target(out: Path) -> None:
    """Raises `ConfigError` unless `out` is free, an empty folder or a bundle."""
    if out.is_dir() and not out.is_symlink() and (is_bundle(out) or not any(out.iterdir())):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists and is not a bundle; it will not be replaced.", remedy="Choose another output folder."
        )


def seal(folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Hashes every file in `folder` and writes bundle.json, all of it flushed to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    manifest = msgspec.structs.replace(manifest, files=files)
    manifest = msgspec.structs.replace(manifest, digest=digest_of(manifest))
    with (folder / MANIFEST).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2))
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _publish(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`. An older bundle is moved aside first and comes back if the rename fails."""
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
