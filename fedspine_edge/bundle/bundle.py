"""The bundle format: one folder that holds a deployable model, and the schema of its bundle.json.

    name.bundle/
      model.onnx            always present; runs on ONNX Runtime on any machine
      model.onnx.data       weights of models that are too large for one protobuf file
      engine.plan           a serialized TensorRT or TensorRT-RTX engine, if one was built
      timing.cache          TensorRT's timing cache, which speeds up the next build on the same chip
      adapter.safetensors   the initial adapter, if adapters are inputs of the model
      tokenizer.json, ...   the tokenizer files of the model folder
      bundle.json           the manifest: tensor names, shapes, widths, producers, hashes, verification results

The size and the hash of every file are checked when a bundle is loaded. The hashes detect damage and mix-ups; they
are not a signature. `publish.py` writes bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedspine_edge.bundle.metrics import Accuracy, BundleRecord, Quantization, Verification
from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, ConfigError, EngineIncompatible
from fedspine_edge.files import Sha256, sha256_of_file

FORMAT_VERSION = 2
MANIFEST, MODEL, PLAN, TIMING_CACHE = "bundle.json", "model.onnx", "engine.plan", "timing.cache"
ADAPTER = "adapter.safetensors"
MAX_MANIFEST_BYTES = 4 * 1024**2

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Positive = Annotated[int, Meta(ge=1)]


class TensorInfo(BundleRecord, frozen=True, kw_only=True):
    """An input or output of the model. Strings in `shape` are dynamic axes: batch, sequence, past, total or rank."""

    name: str
    dtype: Literal["int64", "float32", "float16"]
    shape: tuple[int | str, ...]
    default: int | None = None
    """Value of an optional input that the caller leaves out; None if the input is required."""
    limit: int | None = None
    """Exclusive upper bound of an integer input, such as the size of the vocabulary."""

    @property
    def kind(self) -> Literal["tokens", "past", "adapter"]:
        """Return what provides an input: the caller ("tokens"), the KV cache ("past") or the adapter ("adapter")."""
        if self.name.startswith("past_key_values."):
            return "past"
        return "adapter" if self.name.startswith(("lora.", "head.")) else "tokens"

    def sized(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape with every dynamic axis replaced by its size."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


class LoraModule(BundleRecord, frozen=True, kw_only=True):
    """A linear whose low-rank factors are inputs. `path` is its name in the model and in PEFT's files."""

    path: str
    in_features: int
    out_features: int


class AdapterSpec(BundleRecord, frozen=True, kw_only=True):
    """Describes the adapters that a bundle accepts as inputs."""

    modules: tuple[LoraModule, ...]
    head: dict[str, tuple[int, ...]]
    """Shapes of the task head's parameters, which are part of the adapter."""
    base_sha256: str
    layout_sha256: str
    """Hash of the kept heads and channels, because two models of equal widths can keep different channels."""
    max_rank: int = 64

    @staticmethod
    def layout_digest(heads: Sequence[Sequence[int]], channels: Sequence[Sequence[int]]) -> str:
        """Return the sha256 of the kept heads and channels per layer, as indices into the unpruned model."""
        return hashlib.sha256(json.dumps([heads, channels], separators=(",", ":")).encode()).hexdigest()


class OptimizationProfile(BundleRecord, frozen=True, kw_only=True):
    """The range of shapes an engine is built for, each as (minimum, optimum, maximum)."""

    batch: tuple[Positive, Positive, Positive] = (1, 1, 8)
    tokens: tuple[Positive, Positive, Positive] = (1, 32, 128)
    past: tuple[int, int, int] = (0, 0, 0)
    """Tokens that are already in the KV cache (decoders)."""
    rank: tuple[int, int, int] = (0, 8, 64)
    """Rank of the adapter, if adapters are inputs."""

    def __post_init__(self) -> None:
        axes = (("batch", self.batch, 1), ("tokens", self.tokens, 1), ("past", self.past, 0), ("rank", self.rank, 0))
        for axis, (low, optimum, high), least in axes:
            if not least <= low <= optimum <= high:
                raise ConfigError(
                    f"The profile {axis}={low, optimum, high} is not in ascending order.",
                    remedy=f"Give (minimum, optimum, maximum), each at least {least}.",
                )

    @property
    def summary(self) -> str:
        batch, tokens, past = self.batch, self.tokens, self.past
        after = f" after {past[0]}–{past[2]}" if past[2] else ""
        return f"batch {batch[0]}–{batch[2]}, tokens {tokens[0]}–{tokens[2]} (optimum {batch[1]} × {tokens[1]}){after}"

    def covers(self, batch: int, tokens: int, past: int = 0) -> bool:
        """Return whether an input of (batch, tokens) after `past` cached tokens fits this profile."""
        given = ((self.batch, batch), (self.tokens, tokens), (self.past, past))
        return all(low <= value <= high for (low, _, high), value in given)

    def sizes(self, corner: int) -> dict[str, int]:
        """Return the size of every dynamic axis at the minimum (0), optimum (1) or maximum (2) shape."""
        tokens, past = self.tokens[corner], self.past[corner]
        return {
            "batch": self.batch[corner],
            "sequence": tokens,
            "past": past,
            "total": tokens + past,
            "rank": self.rank[corner],
        }


class LayerWidths(BundleRecord, frozen=True, kw_only=True):
    """Number of KV heads and FFN channels that one layer keeps."""

    heads: Positive
    channels: Positive


class EngineInfo(BundleRecord, frozen=True, kw_only=True):
    """Builder and target of a plan, compared with this machine before TensorRT reads the plan."""

    backend: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    """Exact version of the builder. A plan loads in no other version."""
    compute_capabilities: tuple[str, ...]
    """SM numbers, such as "87"."""
    built_on: str = ""
    """Name of the GPU; empty if the plan was built without one."""
    l4t: str = ""
    """Jetson Linux release of the machine that built the plan."""
    flags: tuple[str, ...] = ()
    """Builder flags by name, because their integer values differ between releases."""
    profiles: tuple[OptimizationProfile, ...]
    workspace_bytes: int = 0
    """Limit of the builder's scratch memory; 0 for TensorRT's default."""
    verification: Verification | None = None
    not_verified: str = ""
    """Reason why the plan was not run after the build; empty if it was."""


class FileEntry(BundleRecord, frozen=True, kw_only=True):
    """Size and hash of one file of the bundle."""

    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class BundleManifest(BundleRecord, frozen=True, kw_only=True):
    """The content of bundle.json."""

    format_version: int = FORMAT_VERSION
    producer: dict[str, str]
    """Versions of the software that wrote the bundle: fedspine_edge, python, torch, onnx, ..."""
    task: Task
    family: str
    precision: Precision
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    max_tokens: Positive
    """Longest sequence that the model's positions allow."""
    pad_token_id: int = 0
    labels: tuple[str, ...] = ()
    """Class names in the order of the logits (classifiers and token classifiers)."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a generated text (causal models)."""
    adapter: AdapterSpec | None = None
    """Description of the adapters; None if adapters are not inputs of the model."""
    widths: tuple[LayerWidths, ...] = ()
    sparsity: float = 0.0
    """Measured share of the unpruned model's parameters that were removed."""
    num_parameters: int = 0
    verification: Verification
    """Comparison of the ONNX model with torch."""
    cache_verification: Verification | None = None
    """Comparison of a decoder that runs token by token on its KV cache with torch without a cache."""
    quantization: Quantization | None = None
    accuracy: Accuracy | None = None
    """Accuracy on the user's examples; None if there were none."""
    default_profile: OptimizationProfile | None = None
    """Default profile for engines, derived from the lengths of the user's examples."""
    engine: EngineInfo | None = None
    engine_absent: str = ""
    """Reason why the bundle has no plan; empty if it has one."""
    files: dict[FileName, FileEntry] = {}
    digest: str = ""
    """sha256 of this record with an empty `digest`."""

    @property
    def num_labels(self) -> int:
        """Number of classes; at least 2, also for models without labels."""
        return max(2, len(self.labels))

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain values, for JSON."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle on disk whose files have been verified."""

    folder: Path
    manifest: BundleManifest
    source: Path
    """The folder or the packed bundle that the user named, for messages."""

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    @property
    def plan_path(self) -> Path:
        return self.folder / PLAN

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file of the bundle. Raises `CheckpointError` if it changed after it was verified."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self.source / name} cannot be read: {error.strerror}.", remedy="Load the bundle again."
            ) from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise CheckpointError(f"{self.source / name} changed while it was loaded.", remedy="Load the bundle again.")
        return data

    @property
    def size_bytes(self) -> int:
        """Total size of all files except bundle.json."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())


def is_bundle(folder: str | Path) -> bool:
    """Return whether `folder` contains a bundle.json. The files are not checked."""
    return (Path(folder) / MANIFEST).is_file()


def rebuild_command(folder: Path) -> str:
    """Return the command that rebuilds the plan of a bundle from its own model.onnx, on the machine that runs it."""
    return f"fedspine-edge compile {folder} --out {folder}"


def load_bundle(folder: str | Path, *, ignore: Collection[str] = (), source: Path | None = None) -> Bundle:
    """Read bundle.json and verify every file that it lists, except those in `ignore`.

    Args:
        folder: Folder of the bundle.
        ignore: Names of files that are not verified.
        source: Packed bundle that the folder was unpacked from, for messages.

    Raises:
        CheckpointError: There is no bundle, or a file is missing, truncated or altered.
        EngineIncompatible: engine.plan or timing.cache is missing, truncated or altered. Both can be rebuilt, and the
            remedy is the command that does it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if name not in ignore:
            _check_file(folder, name, entry, source or folder)
    if MODEL not in manifest.files or (manifest.engine is not None and PLAN not in manifest.files):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list {MODEL if MODEL not in manifest.files else PLAN}.",
            remedy=_FROM_SOURCE,
        )
    return Bundle(folder=folder, manifest=manifest, source=source or folder)


_FROM_SOURCE = "Recreate the bundle from its model: fedspine-edge compile MODEL_FOLDER --out BUNDLE"


def read_manifest(folder: str | Path) -> BundleManifest:
    """Read and validate bundle.json alone; the other files are not checked. Raises `CheckpointError`."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a bundle: it contains no bundle.json" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}.", remedy="Create one with: fedspine-edge compile MODEL_FOLDER")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes.", remedy=_FROM_SOURCE)
    raw = path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format_version", msgspec.Raw(b"0"))
        if bytes(version) != str(FORMAT_VERSION).encode():
            raise CheckpointError(
                f"{path} has format version {bytes(version).decode()}; this release reads version {FORMAT_VERSION}.",
                remedy=_FROM_SOURCE,
            )
        manifest = msgspec.json.decode(raw, type=BundleManifest)
    except (msgspec.DecodeError, ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy=_FROM_SOURCE) from error
    if manifest.digest != digest_of(manifest):
        raise CheckpointError(
            f"{path} was altered after it was written: its digest does not match.", remedy=_FROM_SOURCE
        )
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry, source: Path) -> None:
    problem = damage_of(folder / name, entry)
    if problem and name in (PLAN, TIMING_CACHE):
        raise EngineIncompatible(f"{source / name} {problem}.", remedy=f"Rebuild it with: {rebuild_command(source)}")
    if problem:
        raise CheckpointError(f"{source / name} {problem}.", remedy=_FROM_SOURCE)


def damage_of(path: Path, entry: FileEntry) -> str:
    """Return what is wrong with a file that bundle.json lists as `entry`, or an empty string."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.size_bytes:
        return f"has {path.stat().st_size} bytes instead of {entry.size_bytes}"
    if sha256_of_file(path) != entry.sha256:
        return "was altered: its sha256 does not match bundle.json"
    return ""


def digest_of(manifest: BundleManifest) -> str:
    """Return the sha256 of a manifest's own content."""
    bare = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def producer_versions(*packages: str) -> dict[str, str]:
    """Return the versions of this package, of Python and of those `packages` that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("fedspine-edge", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
