"""Sessions: a bundle that is loaded and ready to run, on its engine if that fits this machine, else on ONNX Runtime.

with Session.load("model.bundle") as session:
    session.classify("a fine film")                  # Prediction(label='positive', probability=0.98, index=1)
    session.run(input_ids=ids, attention_mask=mask)  # logits
"""

from __future__ import annotations

import functools
import numbers
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.archive import is_archive, unpack
from fedspine_edge.bundle.bundle import BundleManifest
from fedspine_edge.engine.tensorrt_builder import BACKENDS, BackendChoice
from fedspine_edge.errors import ConfigError, DataError
from fedspine_edge.runtime import classification, generation
from fedspine_edge.runtime.generation import GenerationSettings, Sampling
from fedspine_edge.runtime.inputs import random_tokens, require_number
from fedspine_edge.runtime.latency import latency_statistics, time_interleaved
from fedspine_edge.runtime.loaded_model import LoadedModel
from fedspine_edge.runtime.results import Generation, LatencyComparison, LatencyStatistics, Prediction, WordLabel
from fedspine_edge.runtime.runner_selection import LoadOptions, OpenedBundle, open_bundle
from fedspine_edge.runtime.text import Text, TextCodec, Words

__all__ = [
    "Generation",
    "LatencyComparison",
    "LatencyStatistics",
    "Prediction",
    "Session",
    "WordLabel",
    "compare_latency",
]

T = TypeVar("T")
_POOL_SIZE = 4
"""Threads of a session for the `*_async` methods."""


class Session:
    """A loaded bundle. All methods can be called from several threads. Create sessions with `Session.load`.

    Attributes:
        backend: Backend that runs the model: "onnxruntime", "tensorrt" or "tensorrt_rtx".
        why: One sentence with the reason for the choice of the backend.
        bundle: The verified bundle, with its manifest.
        model: The loaded model, for code that runs or times it directly.
    """

    def __init__(self, opened: OpenedBundle) -> None:
        self.bundle, self.backend, self.why = opened.bundle, opened.backend, opened.why
        self.model = LoadedModel(opened.bundle, opened.runner)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: BackendChoice = "auto",
        *,
        threads: int | None = None,
        spin_wait: bool = True,
        rebuild: bool = False,
        spinning: bool | None = None,
    ) -> Session:
        """Verify a bundle and load it. The session no longer needs the bundle's files afterwards.

        Args:
            bundle: Folder or .zip file that `compile_engine` wrote.
            backend: "auto" uses the engine if it fits this machine, else ONNX Runtime. The other values require that
                backend.
            threads: Threads within an operator of ONNX Runtime; None selects one per core that this process may
                use, according to its affinity and the CPU quota of its container. Engines ignore it.
            spin_wait: Whether ONNX Runtime's threads spin while they wait for work, which is fastest if no other
                program needs the cores. Otherwise False makes the slowest runs much faster.
            rebuild: If the bundle's engine is damaged, missing or does not fit this machine, rebuild it from the
                bundle's own model.onnx (takes minutes; the bundle must be writable).
            spinning: Deprecated name of `spin_wait`.

        Raises:
            CheckpointError: The bundle is missing, truncated or altered.
            EngineIncompatible: An engine was requested and does not fit; the remedy is the command to rebuild it.
            MissingDependency: A package that the backend needs is missing.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"`backend` is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
        if threads is not None:
            require_number("threads", threads, numbers.Integral)
        if threads is not None and threads < 1:
            raise ConfigError(f"`threads` is {threads}.", remedy="Give at least 1, or omit it for one per core.")
        if spinning is not None:
            warnings.warn("`spinning` was renamed to `spin_wait`.", DeprecationWarning, stacklevel=2)
            spin_wait = spinning
        archive = Path(bundle) if is_archive(bundle) else None
        options = LoadOptions(backend=backend, threads=threads, spin_wait=spin_wait, rebuild=rebuild, archive=archive)
        if archive is None:
            return cls(open_bundle(Path(bundle), options))
        with unpack(archive) as folder:  # nothing is read from the folder after loading
            return cls(open_bundle(Path(folder), options))

    @property
    def manifest(self) -> BundleManifest:
        """The content of bundle.json."""
        return self.bundle.manifest

    @property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer. Raises `DeployError` if the bundle has none."""
        return self.model.codec

    def run(self, **inputs: Array) -> Array:
        """Run the model once.

        Args:
            inputs: Integer arrays of shape (batch, tokens), one per input of the model; `session.manifest.inputs`
                lists them. `token_type_ids` can be omitted (zeros).

        Returns:
            float32 logits: (batch, labels) for classification, (batch, tokens, labels) for token classification and
            (batch, tokens, vocabulary) for a causal model.

        Raises:
            DataError: An input is missing, unknown, out of range, too long, or of the wrong type or shape.
        """
        return self.model.run(inputs)

    def run_async(self, **inputs: Array) -> Future[Array]:
        """Call `run` on a thread of this session; the future has its result or its exception.

        In asyncio, use `await asyncio.wrap_future(session.run_async(...))`. The inputs must not be modified meanwhile.
        """
        return self._submit(lambda: self.run(**inputs))

    def classify_async(self, text: Text | Sequence[Text], *, batch_size: int = 16) -> Future[Any]:
        """Call `classify` on a thread of this session; see `run_async`."""
        classify: Callable[..., Any] = self.classify
        return self._submit(lambda: classify(text, batch_size=batch_size))

    def label_words_async(self, words: Words | Sequence[Words], *, batch_size: int = 16) -> Future[Any]:
        """Call `label_words` on a thread of this session; see `run_async`."""
        label_words: Callable[..., Any] = self.label_words
        return self._submit(lambda: label_words(words, batch_size=batch_size))

    def generate_async(self, prompt: str | Sequence[int], **settings: Any) -> Future[Generation]:
        """Call `generate` on a thread of this session; see `run_async`."""
        return self._submit(lambda: self.generate(prompt, **settings))

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        with self._pool_lock:
            _ = self.model.runner  # raises if the session is closed
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_POOL_SIZE, thread_name_prefix="fedspine-session")
            pool = self._pool
        return pool.submit(call)

    def set_adapter(self, folder: str | Path | None) -> None:
        """Replace the adapter, and the task head that belongs to it, for all runs that start from now on.

        The bundle must be compiled with `lora="inputs"`. Nothing is rebuilt, and any rank up to 64 is supported.

        Args:
            folder: Folder of a PEFT adapter, as written by `PrunableModel.save` and `EdgeTuner.save`. None restores the
                adapter of the bundle.

        Raises:
            DeployError: The bundle's adapter is merged into the weights.
            CheckpointError: The adapter is damaged or belongs to another model. The current adapter stays set.
        """
        self.model.set_adapter(folder)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Continue a text with a decoder.

        Args:
            prompt: Text or token ids. No chat template is applied.
            max_new_tokens: Maximum length of the answer in tokens.
            temperature: 0 always selects the most likely token; above 0, tokens are sampled.
            top_k: Sample only from the k most likely tokens; 0 means all.
            top_p: Sample only from the most likely tokens whose probabilities sum to this value.
            seed: Seed of the sampling. The same seed gives the same text.
            stop: Strings that end the text; it ends before the first of them.

        Raises:
            DeployError: The model cannot generate, or the bundle has no tokenizer.
            DataError: The prompt is empty or too long.
            ConfigError: A setting is invalid.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return generation.generate(self.model, prompt, _settings(sampling, max_new_tokens, stop))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Generate like `generate`, but return an iterator over pieces of the text as they are generated.

        Invalid arguments raise before the first piece.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return generation.stream(self.model, prompt, _settings(sampling, max_new_tokens, stop))

    @overload
    def classify(self, text: Text, *, batch_size: int = ...) -> Prediction: ...
    @overload
    def classify(
        self, text: list[str] | list[tuple[str, str]] | list[Text], *, batch_size: int = ...
    ) -> list[Prediction]: ...
    def classify(self, text: Text | Sequence[Text], *, batch_size: int = 16) -> Prediction | list[Prediction]:
        """Tokenize and classify a text, a pair of texts (a tuple), or a list of either; a list keeps its order.

        Texts that are longer than the model or its engine allows are truncated. A list is run in batches of
        `batch_size` texts of similar length.

        Raises:
            DataError: `text` has another type or is an empty list.
            DeployError: The model is not a classifier, or the bundle has no tokenizer.json.
        """
        single = isinstance(text, (str, tuple))
        texts: list[Any] = [text] if single else _as_list(text)
        predictions = classification.classify(self.model, texts, batch_size)
        return predictions[0] if single else predictions

    @overload
    def label_words(self, words: Words, *, batch_size: int = ...) -> list[WordLabel]: ...
    @overload
    def label_words(self, words: list[list[str]] | list[Words], *, batch_size: int = ...) -> list[list[WordLabel]]: ...
    def label_words(
        self, words: Words | Sequence[Words], *, batch_size: int = 16
    ) -> list[WordLabel] | list[list[WordLabel]]:
        """Label every word of a text (a list of words), or of each of several texts; the order is kept.

        The first token of a word determines its label, as in training. Split the text into words as the training data
        was split. Several texts are run in batches as in `classify`.

        Raises:
            DataError: `words` has another type, a text is empty, a word has no tokens, or a text is longer than the
                model or its engine allows; the remedy then states how many of its words fit.
            DeployError: The model is not a token classifier, or the bundle has no tokenizer.json.
        """
        given: list[Any] = _as_list(words)
        single = not isinstance(words, str) and bool(given) and isinstance(given[0], str)
        labels = classification.label_words(self.model, [given] if single else given, batch_size)
        return labels[0] if single else labels

    def tokenize(self, texts: Sequence[Text]) -> dict[str, Array]:
        """Return the model's inputs for texts or pairs, truncated to the limit and padded to the longest."""
        return self.codec.pad(self.codec.encode(texts))

    def bench(self, batch: int = 1, tokens: int = 32, repeats: int = 100, *, warmup: int = 10) -> LatencyStatistics:
        """Time `repeats` runs on random tokens, after `warmup` runs that are not counted.

        Raises `DataError` if `tokens` exceeds the model's limit.
        """
        run = self._timed_run(batch, tokens)
        return latency_statistics(self.backend, batch, tokens, time_interleaved([run], repeats, warmup)[0])

    def random_inputs(self, batch: int, tokens: int) -> dict[str, Array]:
        """Return random tokens of shape (batch, tokens) without padding, for timing."""
        return random_tokens(self.manifest, batch, tokens)

    def _timed_run(self, batch: int, tokens: int) -> Callable[[], Any]:
        """Return a function that runs the model on prepared inputs, without validation."""
        return functools.partial(self.model.runner.run, self.model.model_inputs(self.random_inputs(batch, tokens)))

    def close(self) -> None:
        """Free the model. Pending asynchronous calls finish first. Calling it again has no effect."""
        with self._pool_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self.model.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_list(values: Any) -> list[Any]:
    """Return a list of texts. Raises `DataError` for a value that is not iterable."""
    if not isinstance(values, Iterable):
        raise DataError(f"A text has the type {type(values).__name__}.", remedy="Give a text or a list of texts.")
    return list(values)


def _settings(sampling: Sampling, max_new_tokens: int, stop: str | Sequence[str]) -> GenerationSettings:
    if not isinstance(stop, Iterable):
        raise ConfigError(f"`stop` is {stop!r}.", remedy="Give a string or several.")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerationSettings(sampling=sampling, max_new_tokens=max_new_tokens, stop=strings)


def compare_latency(
    first: Session, second: Session, *, batch: int = 1, tokens: int = 32, repeats: int = 200
) -> LatencyComparison:
    """Time two sessions on the same shape in interleaved runs: first, second, first, ...

    For a fair comparison, load both with the same `threads` and `backend`.
    """
    runs = [session._timed_run(batch, tokens) for session in (first, second)]
    times = time_interleaved(runs, repeats)
    a, b = (
        latency_statistics(session.backend, batch, tokens, session_times)
        for session, session_times in zip((first, second), times)
    )
    return LatencyComparison(first=a, second=b, ratio=b.p50_ms / a.p50_ms)
