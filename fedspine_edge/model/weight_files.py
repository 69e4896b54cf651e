"""Finds, hashes and reads the weight files of a model folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import sha256_of_file

_PERMISSION = "Give the user of this process read permission for the file: chmod a+r FILE"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def base_digest(folder: str | Path, gguf_file: str | None = None) -> str:
    """Return the SHA-256 that identifies the frozen base weights.

    For a single weight file this is the hash that `sha256sum` prints. For shards it is the hash of the lines that
    `sha256sum` prints, sorted by file name. Raises `CheckpointError` if there are no weights.
    """
    files = weight_files(Path(folder), gguf_file)
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(folder: Path, gguf_file: str | None = None) -> list[Path]:
    """Return the weight files, sorted. Raises `CheckpointError` if one is missing or is a pickle."""
    if gguf_file is not None:
        return [folder / gguf_file]
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / str(name) for name in names)
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}.") from error
        missing = [file.name for file in files if not file.exists()]
        if missing or not files:
            raise CheckpointError(
                f"{folder} lacks the weight shard {missing[0] if missing else '(none listed)'}.",
                remedy="Copy the model folder again, with all its files.",
            )
        return files
    refuse_pickles(folder)
    raise CheckpointError(f"{folder} has no model.safetensors.", remedy="Pass a complete Hugging Face model folder.")


def refuse_pickles(folder: Path) -> None:
    """Raise `CheckpointError` if `folder` holds a pickled weight file."""
    found = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if found:
        raise CheckpointError(
            f"{folder} holds pickled weights ({found[0]}), which can run code when they are read.",
            remedy="Convert them on a machine where you trust them: "
            f"transformers.{_model_class(folder)}.from_pretrained(folder).save_pretrained(new_folder), and "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(new_folder).",
        )


def _model_class(folder: Path) -> str:
    """Return the class that config.json names, so that a head is converted with the rest."""
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        return str(names[0]) if str(names[0]).isidentifier() else "AutoModel"
    except (OSError, ValueError, LookupError, TypeError):
        return "AutoModel"


def check_readable(files: list[Path]) -> None:
    """Raise `CheckpointError` for the first safetensors file whose header does not match its size."""
    for file in files:
        try:
            file.open("rb").close()  # safetensors reports any file that it cannot open as missing
            with safe_open(file, framework="pt"):
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise unreadable(file, error) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file. Raises `CheckpointError`."""
    try:
        path.open("rb").close()
        return dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file that cannot be read as safetensors."""
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path} cannot be read: Permission denied.", remedy=_PERMISSION)
    return CheckpointError(
        f"{path} cannot be read: {str(error).strip().rstrip('.')}.",
        remedy="It is truncated, damaged or not a safetensors file; copy it again and compare its sha256sum.",
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises `CheckpointError` if it cannot be read."""
    try:
        return sha256_of_file(path)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", remedy="Copy the model folder again, with all its files."
        ) from error


def check_finite(module: nn.Module, where: Path) -> None:
    """Raise `CheckpointError` for the first parameter with NaN or infinity."""
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{where}: weight {name!r} has non-finite values.", remedy="The file is damaged.")
