"""Every error this package raises on purpose, as one tree.

    FedspineError
    ├── ConfigError            a setting, flag or argument is wrong
    ├── MissingDependency      an optional package is absent; names the extra that brings it
    ├── DataError              the user's data cannot be used
    ├── ModelError
    │   ├── UnknownArchitecture    no entry in model/families.py
    │   ├── LayoutError            kept indices that do not fit the model
    │   ├── CheckpointError        missing, truncated, tampered or mismatched files
    │   └── OutOfMemory            a training step does not fit, one example at a time
    ├── KernelError            a native op refused its input or failed to launch
    ├── WireError
    │   ├── MessageError           bytes that are not a valid message
    │   └── BlobError              a blob whose size or hash is wrong
    ├── TransportError
    │   └── BrokerUnreachable
    ├── UpdateRejected         the server's gate refused a device's update
    └── DeployError
        ├── ExportMismatch         the exported model disagrees with torch
        ├── EngineBuildError       TensorRT could not build
        └── EngineIncompatible     a plan made for another version, chip or model

Each says what happened and where in its message, and what to do in `remedy`. An argument that the user can change
stands there as Python has it, in backticks: `text_pair`; `in_words` writes it as the command line or a settings file
does. The command line prints both and exits with code 2; nothing that existed before the call has been overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class FedspineError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What happened and where, one sentence.
        remedy: What the user can do about it, one sentence; may be empty.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message

    def in_words(self, names: Mapping[str, str]) -> str:
        """This error with the arguments in backticks as `names` has them: flags, or settings of a file."""
        return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(self))


class ConfigError(FedspineError):
    """A setting, flag or argument is wrong."""


class MissingDependency(FedspineError):
    """An optional package is needed and absent."""

    @classmethod
    def of(cls, package: str, *, extra: str, purpose: str) -> MissingDependency:
        """The error for `package`, which `pip install fedspine-edge[extra]` brings."""
        return cls(
            f"{purpose} needs the package {package!r}, which is not installed.",
            remedy=f"Install it with: pip install 'fedspine-edge[{extra}]'",
        )

    @classmethod
    def from_import(cls, error: ModuleNotFoundError, *, purpose: str) -> MissingDependency:
        """The error for a failed import; re-raises `error` if the module is none of our optional ones."""
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise error
        return cls.of(package, extra=_EXTRAS[package], purpose=purpose)


_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "huggingface_hub", "accelerate", "psutil"), "device"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "tokenizers"), "export"),
    **dict.fromkeys(("matplotlib", "jinja2", "tomli_w", "gguf"), "demo"),
    "iotcore": "broker",
    "pyarrow": "data",
}


class DataError(FedspineError):
    """The user's data cannot be used: missing file, missing column, label out of range, empty."""


class ModelError(FedspineError):
    """The model cannot be used."""


class UnknownArchitecture(ModelError):
    """The model's family has no entry in the architecture table."""


class LayoutError(ModelError):
    """Kept indices that do not fit the model."""


class CheckpointError(ModelError):
    """Missing, truncated, tampered or mismatched model files."""


class OutOfMemory(ModelError):
    """A training step does not fit into memory, even one example at a time."""


class KernelError(FedspineError):
    """A native op refused its input or failed to launch."""


class WireError(FedspineError):
    """Something that came over the wire is unusable."""


class MessageError(WireError):
    """Bytes that are not a valid message of the expected kind."""


class BlobError(WireError):
    """A blob whose size or hash is not what was announced."""


class TransportError(FedspineError):
    """The connection to the broker failed."""


class BrokerUnreachable(TransportError):
    """No broker answers at the configured address."""


class UpdateRejected(FedspineError):
    """The server's gate refused a device's update; the message is the reason."""


class DeployError(FedspineError):
    """Export, engine build or runtime failed."""


class ExportMismatch(DeployError):
    """The exported model disagrees with torch beyond tolerance."""


class EngineBuildError(DeployError):
    """TensorRT could not build an engine."""


class EngineIncompatible(DeployError):
    """A serialized plan made for another TensorRT version, chip or model."""
