"""A finished model on disk: one folder that the runtime can check before it trusts it.

    name.bundle/
      model.onnx            always; runs on ONNX Runtime anywhere
      model.onnx.data       weights of models too large for one protobuf file
      engine.plan           a TensorRT or TensorRT-RTX plan, where one was built
      timing.cache          what the builder measured, for the next build on the same chip (TensorRT)
      adapter.safetensors   the adapter it starts with, where adapters are inputs
      tokenizer.json, …     the tokenizer files of the model folder
      bundle.json           what the others are: names, shapes, widths, producers, hashes, verification

Every file is size- and hash-checked on load. The hashes find damage and mix-ups; they are not a signature.
`publish.py` writes bundles. No torch, no transformers and no TensorRT here.
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
MANIFEST, MODEL, PLAN, TIMINGS = "bundle.json", "model.onnx", "engine.plan", "timing.cache"
ADAPTER = "adapter.safetensors"
MAX_MANIFEST_BYTES = 4 * 1024**2

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Positive = Annotated[int, Meta(ge=1)]


class TensorInfo(BundleRecord, frozen=True, kw_only=True):
    """An input or output of the model. A string in `shape` is a dynamic axis: batch, sequence, past, total, rank."""

    name: str
    dtype: Literal["int64", "float32", "float16"]
    shape: tuple[int | str, ...]
    default: int | None = None
    """An input that may be left out is filled with this; None means required."""
    limit: int | None = None
    """Integer inputs must lie in 0..limit-1 (the vocabulary, for instance)."""

    @property
    def kind(self) -> Literal["tokens", "past", "adapter"]:
        """Who fills an input: the caller, the KV cache, or the adapter that is set."""
        if self.name.startswith("past_key_values."):
            return "past"
        return "adapter" if self.name.startswith(("lora.", "head.")) else "tokens"

    def sized(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape with every dynamic axis replaced by its size."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


class LoraModule(BundleRecord, frozen=True, kw_only=True):
    """A linear whose low-rank factors are inputs; `path` is its name in the model and in PEFT's files."""

    path: str
    in_features: int
    out_features: int


class AdapterSpec(BundleRecord, frozen=True, kw_only=True):
    """What an adapter for this bundle must look like."""

    modules: tuple[LoraModule, ...]
    head: dict[str, tuple[int, ...]]
    """Shapes of the task head's parameters, which travel with the adapter."""
    base_sha256: str
    layout_sha256: str
    """Of the kept heads and channels: two models can have the same widths and other channels."""
    max_rank: int = 64

    @staticmethod
    def layout_digest(heads: Sequence[Sequence[int]], channels: Sequence[Sequence[int]]) -> str:
        """sha256 over kept heads and channels, per layer, in the unpruned model's numbering."""
        return hashlib.sha256(json.dumps([heads, channels], separators=(",", ":")).encode()).hexdigest()


class OptimizationProfile(BundleRecord, frozen=True, kw_only=True):
    """The shapes an engine is built for: (smallest, most common, largest) batch and tokens per sequence."""

    batch: tuple[Positive, Positive, Positive] = (1, 1, 8)
    tokens: tuple[Positive, Positive, Positive] = (1, 32, 128)
    past: tuple[int, int, int] = (0, 0, 0)
    """Tokens already in the KV cache (decoders)."""
    rank: tuple[int, int, int] = (0, 8, 64)
    """Rank of the adapter, where adapters are inputs."""

    def __post_init__(self) -> None:
        axes = (("batch", self.batch, 1), ("tokens", self.tokens, 1), ("past", self.past, 0), ("rank", self.rank, 0))
        for axis, (low, common, high), least in axes:
            if not least <= low <= common <= high:
                raise ConfigError(
                    f"profile {axis}={low, common, high} is not in order.",
                    remedy=f"Give (smallest, most common, largest), each at least {least}.",
                )

    @property
    def summary(self) -> str:
        batch, tokens, past = self.batch, self.tokens, self.past
        after = f" after {past[0]}–{past[2]}" if past[2] else ""
        return f"batch {batch[0]}–{batch[2]}, tokens {tokens[0]}–{tokens[2]} (best at {batch[1]} × {tokens[1]}){after}"

    def covers(self, batch: int, tokens: int, past: int = 0) -> bool:
        """Whether an input of (batch, tokens) after `past` cached tokens can run under this profile."""
        given = ((self.batch, batch), (self.tokens, tokens), (self.past, past))
        return all(low <= value <= high for (low, _, high), value in given)

    def sizes(self, corner: int) -> dict[str, int]:
        """Size of every dynamic axis at the smallest (0), most common (1) or largest (2) shape."""
        tokens, past = self.tokens[corner], self.past[corner]
        return {
            "batch": self.batch[corner],
            "sequence": tokens,
            "past": past,
            "total": tokens + past,
            "rank": self.rank[corner],
        }


class LayerWidths(BundleRecord, frozen=True, kw_only=True):
    """What one layer keeps: attention groups (KV heads) and FFN channels."""

    heads: Positive
    channels: Positive


class EngineInfo(BundleRecord, frozen=True, kw_only=True):
    """What a serialized plan was made by and for; checked before TensorRT sees the plan."""

    backend: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    """Exact version of the builder: a plan loads in no other."""
    compute_capabilities: tuple[str, ...]
    """SM numbers such as "87"."""
    built_on: str = ""
    """GPU name, empty when built without one."""
    l4t: str = ""
    """Jetson Linux release of the building machine."""
    flags: tuple[str, ...] = ()
    """Builder flags by name; their integers differ between releases."""
    profiles: tuple[OptimizationProfile, ...]
    workspace_bytes: int = 0
    """Scratch memory that the builder was allowed; 0 for its default."""
    verification: Verification | None = None
    not_verified: str = ""
    """Why the plan was not run after building, when it was not."""


class FileEntry(BundleRecord, frozen=True, kw_only=True):
    """Size and hash of one file of the bundle."""

    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class BundleManifest(BundleRecord, frozen=True, kw_only=True):
    """The content of bundle.json."""

    format_version: int = FORMAT_VERSION
    producer: dict[str, str]
    """Versions of what wrote the bundle: fedspine_edge, python, torch, onnx, ..."""
    task: Task
    family: str
    precision: Precision
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    max_tokens: Positive
    """Longest sequence the model's positions allow."""
    pad_token_id: int = 0
    labels: tuple[str, ...] = ()
    """Class names in the order of the logits (classification of texts and of words)."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a text (causal models)."""
    adapter: AdapterSpec | None = None
    """What adapters must look like, where they are inputs of the model."""
    widths: tuple[LayerWidths, ...] = ()
    sparsity: float = 0.0
    """Measured share of the unpruned model's parameters that are absent."""
    num_parameters: int = 0
    verification: Verification
    """The ONNX model against torch."""
    cache_verification: Verification | None = None
    """A decoder token by token with its KV cache against torch without one."""
    quantization: Quantization | None = None
    accuracy: Accuracy | None = None
    """Where the user gave examples."""
    default_profile: OptimizationProfile | None = None
    """The shapes that the user's examples ask for; what engines are built for unless told otherwise."""
    engine: EngineInfo | None = None
    engine_absent: str = ""
    """Why there is no plan, when there is none."""
    files: dict[FileName, FileEntry] = {}
    digest: str = ""
    """sha256 of this record with an empty digest."""


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle on disk whose files have been checked."""

    folder: Path
    manifest: BundleManifest

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    @property
    def plan_path(self) -> Path:
        return self.folder / PLAN

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but bundle.json."""
        return sum(entry.size_bytes for entry in self.manifest.files.values())


def is_bundle(folder: str | Path) -> bool:
    """Whether `folder` has a bundle.json; says nothing about its health."""
    return (Path(folder) / MANIFEST).is_file()


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """bundle.json as plain values, for JSON; the other files are not checked."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(_read_manifest(Path(folder))))
    return values


def rebuild_command(folder: Path) -> str:
    """What to type to make the plan of a bundle anew from its own model.onnx, on the machine that runs it."""
    return f"fedspine-edge compile {folder} --out {folder}"


def load_bundle(folder: str | Path, *, ignore: Collection[str] = ()) -> Bundle:
    """Reads bundle.json and checks every file it lists but those in `ignore`.

    Raises:
        CheckpointError: No bundle there, or a file is missing, truncated or altered.
        EngineIncompatible: The same for engine.plan or timing.cache, which can be made anew: the remedy says how.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        if name not in ignore:
            _check_file(folder, name, entry)
    if MODEL not in manifest.files or (manifest.engine is not None and PLAN not in manifest.files):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list {MODEL if MODEL not in manifest.files else PLAN}.",
            remedy=_FROM_SOURCE,
        )
    return Bundle(folder=folder, manifest=manifest)


_FROM_SOURCE = "Make the bundle anew from its model: fedspine-edge compile MODEL_FOLDER --out BUNDLE"


def _read_manifest(folder: Path) -> BundleManifest:
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a bundle: it has no bundle.json" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}.", remedy="Make one with: fedspine-edge compile MODEL_FOLDER")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes.", remedy=_FROM_SOURCE)
    raw = path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format_version", msgspec.Raw(b"0"))
        if bytes(version) != str(FORMAT_VERSION).encode():
            raise CheckpointError(
                f"{path} has format {bytes(version).decode()}; this release reads format {FORMAT_VERSION}.",
                remedy=_FROM_SOURCE,
            )
        manifest = msgspec.json.decode(raw, type=BundleManifest)
    except (msgspec.DecodeError, ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy=_FROM_SOURCE) from error
    if manifest.digest != digest_of(manifest):
        raise CheckpointError(f"{path} was altered after it was written (its own hash differs).", remedy=_FROM_SOURCE)
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    problem = damage_of(folder / name, entry)
    if problem and name in (PLAN, TIMINGS):
        raise EngineIncompatible(f"{folder / name} {problem}.", remedy=f"Build it anew with: {rebuild_command(folder)}")
    if problem:
        raise CheckpointError(f"{folder / name} {problem}.", remedy=_FROM_SOURCE)


def damage_of(path: Path, entry: FileEntry) -> str:
    """What is wrong with a file that bundle.json lists as `entry`; empty where nothing is."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.size_bytes:
        return f"has {path.stat().st_size} bytes instead of {entry.size_bytes}"
    if sha256_of_file(path) != entry.sha256:
        return "was altered: its sha256 is not the one in bundle.json"
    return ""


def digest_of(manifest: BundleManifest) -> str:
    """sha256 of a manifest's own content."""
    bare = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def producer_versions(*packages: str) -> dict[str, str]:
    """Versions of this package, Python and those of `packages` that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("fedspine-edge", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
