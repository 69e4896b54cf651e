"""Errors that this package raises deliberately.

    FedspineError
    ├── ConfigError                invalid setting, option or argument
    ├── MissingDependency          optional package that is not installed
    ├── DataError                  unusable training or evaluation data
    ├── ModelError
    │   ├── UnknownArchitecture    unsupported model family
    │   ├── LayoutError            kept indices that do not fit the model
    │   ├── CheckpointError        missing, truncated, modified or mismatched files
    │   └── OutOfMemory            training step that does not fit into memory
    ├── KernelError                native op that rejected its input or failed to launch
    ├── ProtocolError
    │   ├── MessageError           bytes that are not a valid message
    │   └── BlobError              blob with the wrong size or hash
    ├── TransportError             failed connection to the broker
    │   └── BrokerUnreachable      no broker at the configured address
    ├── UpdateRejected             update that failed validation at the server
    └── DeployError                failed export, engine build or inference
        ├── ExportMismatch         exported model that disagrees with torch
        ├── EngineBuildError       failed TensorRT build
        └── EngineIncompatible     plan for another TensorRT version, GPU or model

Each error has a message, which describes what happened and where, and a remedy, which describes what to do. Messages
name arguments as Python does, in backticks: `text_pair`. `FedspineError.with_names` replaces them by the options of
the command line or the keys of a settings file. The command line prints both parts and exits with code 2.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping


class FedspineError(Exception):
    """Base class of all errors of this package.

    Args:
        message: What happened and where, in one sentence.
        remedy: What the user can do about it, in one sentence; may be empty.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  {self.remedy}" if self.remedy else self.message

    def with_names(self, names: Mapping[str, str]) -> str:
        """Return the text of the error with each argument in backticks replaced by its name in `names`."""
        return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(self))


class ConfigError(FedspineError):
    """A setting, an option or an argument is invalid."""


class MissingDependency(FedspineError):
    """An optional package is required but not installed."""

    @classmethod
    def of(cls, package: str, *, extra: str, purpose: str) -> MissingDependency:
        """Return the error for a missing package. It names every missing package of the same extra.

        Args:
            package: Module that could not be imported.
            extra: Extra of fedspine-edge that installs it.
            purpose: What needs the package, as the subject of a sentence.
        """
        modules = [name for name, its_extra in _EXTRAS.items() if its_extra == extra and not _is_installed(name)]
        missing = list(dict.fromkeys([package, *(_DISTRIBUTIONS.get(name, name) for name in modules)]))
        names = ", ".join(repr(name) for name in missing)
        subject = f"the package {names}, which is" if len(missing) == 1 else f"the packages {names}, which are"
        return cls(
            f"{purpose} needs {subject} not installed.",
            remedy=f"Install with: pip install 'fedspine-edge[{extra}]'",
        )

    @classmethod
    def from_import(cls, error: ModuleNotFoundError, *, purpose: str) -> MissingDependency:
        """Return the error for a failed import. Raises `error` again if the module is not an optional dependency."""
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise error
        return cls.of(_DISTRIBUTIONS.get(module, module), extra=_EXTRAS[module], purpose=purpose)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a specification, such as one that a test put in place
        return True


_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "huggingface_hub", "accelerate", "psutil"), "device"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "tokenizers"), "export"),
    **dict.fromkeys(("matplotlib", "jinja2", "tomli_w", "gguf"), "demo"),
    "iotcore": "broker",
    "pyarrow": "data",
    "ray": "ray",
    "tensorboard": "tensorboard",
}
"""Extra that installs each optional module."""

_DISTRIBUTIONS = {"huggingface_hub": "transformers", "tomli_w": "tomli-w"}
"""Distribution that installs a module, where its name differs."""


class DataError(FedspineError):
    """The data cannot be used: missing file or column, label out of range, no examples."""


class ModelError(FedspineError):
    """The model cannot be used."""


class UnknownArchitecture(ModelError):
    """The model belongs to an unsupported family."""


class LayoutError(ModelError):
    """The kept indices do not fit the model."""


class CheckpointError(ModelError):
    """Model files are missing, truncated, modified or do not belong together."""


class OutOfMemory(ModelError):
    """A training step does not fit into memory, even with one example at a time."""


class KernelError(FedspineError):
    """A native op rejected its input or failed to launch."""


class ProtocolError(FedspineError):
    """A received message or blob is invalid."""


class MessageError(ProtocolError):
    """The bytes are not a valid message of the expected type."""


class BlobError(ProtocolError):
    """The size or the hash of a blob differs from the announced one."""


class TransportError(FedspineError):
    """The connection to the broker failed."""


class BrokerUnreachable(TransportError):
    """No broker answers at the configured address."""


class UpdateRejected(FedspineError):
    """The server rejected an update during validation. The message is the reason."""


class DeployError(FedspineError):
    """Export, engine build or inference failed."""


class ExportMismatch(DeployError):
    """The exported model differs from torch by more than the tolerance."""


class EngineBuildError(DeployError):
    """TensorRT could not build the engine."""


class EngineIncompatible(DeployError):
    """The plan belongs to another TensorRT version, GPU or model."""
