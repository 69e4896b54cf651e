"""Runs a bundle: on its engine where that fits this machine, else on ONNX Runtime. No torch, no transformers.

with Session.load("model.bundle") as session:
    session.classify("a fine film")                  # Prediction(label='positive', probability=0.98, index=1)
    session.run(input_ids=ids, attention_mask=mask)  # logits
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import msgspec
import numpy as np
import numpy.typing as npt

from fedspine_edge.deploy import cuda, trt
from fedspine_edge.deploy.bundle import TOKENIZER, Bundle, Manifest, TensorInfo, load_bundle, rebuild_command
from fedspine_edge.deploy.runner import EngineRunner, OnnxRuntimeRunner, Runner
from fedspine_edge.errors import ConfigError, DataError, DeployError, EngineIncompatible, MissingDependency

Array = npt.NDArray[Any]
BackendChoice = Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[str, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
Text = str | tuple[str, str]


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what a session answers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


class Prediction(_Result, frozen=True, kw_only=True):
    """The answer for one text: the label, its softmax probability, and its index in the logits."""

    label: str
    probability: float
    index: int


class Latency(_Result, frozen=True, kw_only=True):
    """Wall time of repeated runs of one shape, in milliseconds."""

    backend: str
    batch: int
    tokens: int
    repeats: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float


class LatencyComparison(_Result, frozen=True, kw_only=True):
    """Two sessions timed in alternation, so that a busy moment of the machine hits both."""

    first: Latency
    second: Latency
    ratio: float
    """Median of the second over median of the first; below 1 the second is faster."""

    @property
    def first_ms(self) -> float:
        """Median of the first session."""
        return self.first.p50_ms

    @property
    def second_ms(self) -> float:
        """Median of the second session."""
        return self.second.p50_ms


class Session:
    """A loaded bundle. Safe to use from several threads; make one with `Session.load`.

    Attributes:
        backend: What runs the model: "onnxruntime", "tensorrt" or "tensorrt_rtx".
        why: One sentence on why it is that one.
        bundle: The checked bundle, with its manifest.
    """

    def __init__(self, bundle: Bundle, runner: Runner, backend: str, why: str) -> None:
        self.bundle, self.backend, self.why = bundle, backend, why
        self._runner: Runner | None = runner
        self._tokenizer_lock = threading.Lock()

    @classmethod
    def load(cls, bundle: str | Path, backend: BackendChoice = "auto", *, threads: int | None = None) -> Session:
        """Checks a bundle and makes it ready to run.

        Args:
            bundle: Folder that `compile_engine` made.
            backend: "auto" takes the engine where it fits this machine and ONNX Runtime otherwise; the other
                names take that backend or fail.
            threads: Threads within an operator of ONNX Runtime; None takes one per core. An engine ignores it.

        Raises:
            CheckpointError: The bundle is missing, truncated or altered.
            EngineIncompatible: An engine was asked for and does not fit; the remedy is the command to rebuild it.
            MissingDependency: The package that the backend needs is absent.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1.", remedy="Leave it out for one per core.")
        checked = load_bundle(bundle)
        if backend == "onnxruntime":
            return cls._on_onnxruntime(checked, threads, "ONNX Runtime, as asked for.")
        try:
            return cls._on_engine(checked, backend)
        except (EngineIncompatible, MissingDependency) as error:
            if backend != "auto":
                raise
            return cls._on_onnxruntime(checked, threads, f"ONNX Runtime, because: {error.message}")

    @classmethod
    def _on_onnxruntime(cls, bundle: Bundle, threads: int | None, why: str) -> Session:
        return cls(bundle, OnnxRuntimeRunner(bundle.model_path, threads=threads), "onnxruntime", why)

    @classmethod
    def _on_engine(cls, bundle: Bundle, wanted: str) -> Session:
        info, rebuild = bundle.manifest.engine, rebuild_command(bundle.folder)
        if info is None:
            reason = bundle.manifest.engine_absent or "none was built"
            raise EngineIncompatible(f"{bundle.folder} has no engine: {reason}", remedy=f"Build one with: {rebuild}")
        if wanted not in ("auto", info.backend):
            raise EngineIncompatible(
                f"{bundle.folder} holds an engine for {info.backend}, not for {wanted}.",
                remedy=f"Build one with: {rebuild} --backend {wanted}",
            )
        backend = trt.find_backend(info.backend)
        device = cuda.device_info()
        trt.check_engine(info, backend, device, rebuild)
        runner = EngineRunner(
            bundle.plan_path.read_bytes(),
            info,
            bundle.manifest.inputs,
            bundle.manifest.outputs,
            backend=backend,
            cuda=cuda.open_cuda(),
            rebuild=rebuild,
        )
        why = f"the {info.backend} {info.version} engine, which was built for this GPU."
        return cls(bundle, runner, info.backend, why)

    @property
    def manifest(self) -> Manifest:
        """What bundle.json says."""
        return self.bundle.manifest

    def run(self, **inputs: Array) -> Array | dict[str, Array]:
        """Runs the model once.

        Args:
            inputs: Integer arrays of shape (batch, tokens), one per input of the model; `session.manifest.inputs`
                lists them. `token_type_ids` may be left out (zeros).

        Returns:
            float32 logits, (batch, labels) for classification and (batch, tokens, vocabulary) for a causal model;
            a dict by name when the model has several outputs.

        Raises:
            DataError: An input is missing, unknown, of the wrong type or shape, out of range, or too long.
        """
        outputs = self._live_runner().run(self._checked_inputs(inputs))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _live_runner(self) -> Runner:
        runner = self._runner
        if runner is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return runner

    def _checked_inputs(self, given: dict[str, Array]) -> dict[str, Array]:
        known = {tensor.name: tensor for tensor in self.manifest.inputs}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise DataError(f"The model has no input {unknown[0]!r}.", remedy=f"Its inputs: {', '.join(known)}")
        shape: tuple[int, ...] | None = None
        for name, array in given.items():
            _check_array(known[name], array, self.manifest.max_tokens)
            if shape is not None and array.shape != shape:
                raise DataError(
                    f"{name} has shape {array.shape}, another input {shape}.",
                    remedy="All inputs must have the same (batch, tokens).",
                )
            shape = array.shape
        checked = {}
        for name, tensor in known.items():
            if name in given:
                checked[name] = np.ascontiguousarray(given[name], dtype=tensor.dtype)
            elif tensor.default is not None and shape is not None:
                checked[name] = np.full(shape, tensor.default, dtype=tensor.dtype)
            else:
                raise DataError(
                    f"The input {name!r} is missing.",
                    remedy=f"Pass an integer numpy array of shape (batch, tokens) as {name}=...",
                )
        return checked

    @overload
    def classify(self, text: Text, *, batch_size: int = ...) -> Prediction: ...
    @overload
    def classify(
        self, text: list[str] | list[tuple[str, str]] | list[Text], *, batch_size: int = ...
    ) -> list[Prediction]: ...
    def classify(self, text: Text | Sequence[Text], *, batch_size: int = 16) -> Prediction | list[Prediction]:
        """Tokenises and classifies a text, a pair of texts (a tuple), or a list of either, in the given order.

        Texts longer than the model or its engine allows are cut. A list runs `batch_size` texts at a time, those
        of similar length together. Raises `DataError` for anything else or an empty list, and `DeployError` when
        the model does not classify or the bundle has no tokenizer.json.
        """
        if self.manifest.task != "classification":
            raise DeployError(f"This bundle holds a {self.manifest.task} model, which has no classes.")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        texts: list[Text] = [text] if isinstance(text, (str, tuple)) else list(text)
        if not texts:
            raise DataError("classify() was given an empty list.", remedy="Give at least one text.")
        encodings = self._encode(texts)
        by_length = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        step = min(batch_size, self._live_runner().max_batch or batch_size)
        found: dict[int, Prediction] = {}
        for start in range(0, len(texts), step):
            chosen = by_length[start : start + step]
            logits = self.run(**self._padded([encodings[index] for index in chosen]))
            if isinstance(logits, dict):
                raise DeployError(f"A classifier has one output; this one has {', '.join(logits)}.")
            found.update(zip(chosen, self._predictions(logits)))
        predictions = [found[index] for index in range(len(texts))]
        return predictions[0] if isinstance(text, (str, tuple)) else predictions

    def _predictions(self, logits: Array) -> list[Prediction]:
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        labels = self.manifest.labels or tuple(str(index) for index in range(scores.shape[-1]))
        best = [int(row.argmax()) for row in scores]
        return [Prediction(label=labels[i], probability=float(row[i]), index=i) for row, i in zip(scores, best)]

    def tokenize(self, texts: Sequence[Text]) -> dict[str, Array]:
        """The model's inputs for texts or pairs: cut to what the model and its engine allow, padded to the longest."""
        return self._padded(self._encode(texts))

    def _encode(self, texts: Sequence[Text]) -> list[Any]:
        for text in texts:
            pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if not (isinstance(text, str) or pair):
                raise DataError(f"{type(text).__name__} is not a text.", remedy="Give str or (str, str).")
        with self._tokenizer_lock:  # the first call loads it
            tokenizer = self._tokenizer
        encodings: list[Any] = tokenizer.encode_batch(list(texts))
        if min(len(encoding.ids) for encoding in encodings) == 0:
            raise DataError("A text has no tokens.", remedy="Leave empty texts out.")
        return encodings

    def _padded(self, encodings: Sequence[Any]) -> dict[str, Array]:
        longest = max(len(encoding.ids) for encoding in encodings)
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        padding = {"input_ids": self.manifest.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        arrays = {}
        for tensor in self.manifest.inputs:
            array = np.full((len(encodings), longest), padding[tensor.name], dtype=np.int64)
            for row, encoding in zip(array, encodings):
                row[: len(encoding.ids)] = getattr(encoding, columns[tensor.name])
            arrays[tensor.name] = array
        return arrays

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency.of("tokenizers", extra="export", purpose="Classifying text") from error
        if TOKENIZER not in self.manifest.files:
            raise DeployError(
                f"{self.bundle.folder} has no {TOKENIZER}.",
                remedy="Put the tokenizer's tokenizer.json into the model folder and compile it anew, "
                "or tokenise yourself and call run().",
            )
        tokenizer = Tokenizer.from_file(str(self.bundle.folder / TOKENIZER))
        # What a training script left in tokenizer.json (a fixed length of 128, say) is not wanted here.
        tokenizer.no_padding()
        limit = self._live_runner().max_tokens
        tokenizer.enable_truncation(min(self.manifest.max_tokens, limit or self.manifest.max_tokens))
        return tokenizer

    def bench(self, batch: int = 1, tokens: int = 32, repeats: int = 100, *, warmup: int = 10) -> Latency:
        """Times `repeats` runs on random tokens, after `warmup` runs that are not counted."""
        inputs = self._random_inputs(batch, tokens)
        times = _time([(self, inputs)], repeats, warmup)
        return _latency(self, batch, tokens, times[0])

    def _random_inputs(self, batch: int, tokens: int) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        inputs: dict[str, Array] = {}
        for tensor in self.manifest.inputs:
            limit = tensor.limit or 2
            # A full mask, and only tokens that cannot be padding: padding would shorten the sequence.
            if tensor.name == "input_ids":
                allowed = np.setdiff1d(np.arange(limit), [self.manifest.pad_token_id])
                inputs[tensor.name] = rng.choice(allowed, size=(batch, tokens)).astype(np.int64)
            else:
                inputs[tensor.name] = np.full((batch, tokens), int(tensor.name == "attention_mask"), dtype=np.int64)
        return inputs

    def close(self) -> None:
        """Frees the engine or the ONNX Runtime session; calling it again does nothing."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_array(tensor: TensorInfo, array: object, max_tokens: int) -> None:
    """Raises `DataError` unless `array` can be the integer input `tensor`."""
    name = tensor.name
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} is a {type(array).__name__}.", remedy="Pass a numpy array, np.array(...).")
    if array.dtype.kind not in "iu":
        raise DataError(f"{name} has dtype {array.dtype}.", remedy=f"Pass {tensor.dtype} (any integer type will do).")
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} has shape {array.shape}.", remedy="Pass (batch, tokens), neither of them 0.")
    if array.shape[1] > max_tokens:
        raise DataError(
            f"{name} has {array.shape[1]} tokens; the model allows {max_tokens}.",
            remedy="Cut the text; classify() does so by itself.",
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or (tensor.limit is not None and high >= tensor.limit):
        raise DataError(
            f"{name} holds {low if low < 0 else high}; it must be within 0..{(tensor.limit or 2**63) - 1}.",
            remedy="Use the tokenizer of this bundle.",
        )


def compare_latency(
    first: Session, second: Session, *, batch: int = 1, tokens: int = 32, repeats: int = 200
) -> LatencyComparison:
    """Times two sessions in alternation within one run: first, second, first, … on the same shape.

    For a fair comparison load both with the same `threads` and `backend`.
    """
    inputs = [(session, session._random_inputs(batch, tokens)) for session in (first, second)]
    times_first, times_second = _time(inputs, repeats, warmup=10)
    a, b = _latency(first, batch, tokens, times_first), _latency(second, batch, tokens, times_second)
    return LatencyComparison(first=a, second=b, ratio=b.p50_ms / a.p50_ms)


def _time(sessions: Sequence[tuple[Session, dict[str, Array]]], repeats: int, warmup: int) -> list[list[float]]:
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; it must be at least 1.")
    prepared = [(session._live_runner(), session._checked_inputs(inputs)) for session, inputs in sessions]
    times: list[list[float]] = [[] for _ in prepared]
    for repeat in range(warmup + repeats):
        for taken, (runner, inputs) in zip(times, prepared):
            start = time.perf_counter()
            runner.run(inputs)
            if repeat >= warmup:
                taken.append((time.perf_counter() - start) * 1e3)
    return times


def _latency(session: Session, batch: int, tokens: int, times_ms: list[float]) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    return Latency(
        backend=session.backend,
        batch=batch,
        tokens=tokens,
        repeats=len(times_ms),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(np.mean(times_ms)),
        min_ms=min(times_ms),
    )
