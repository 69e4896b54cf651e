"""Runs a bundle: on its engine where that fits this machine, else on ONNX Runtime. No torch, no transformers.

with Session.load("model.bundle") as session:
    session.classify("a fine film")                  # Prediction(label='positive', probability=0.98, index=1)
    session.run(input_ids=ids, attention_mask=mask)  # logits
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, TypeVar, overload

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.archive import is_archive, unpack
from fedspine_edge.bundle.bundle import BundleManifest
from fedspine_edge.errors import ConfigError, DeployError
from fedspine_edge.runtime import classification
from fedspine_edge.runtime.adapters import bundled_adapter, read_adapter
from fedspine_edge.runtime.classification import Prediction, WordLabel
from fedspine_edge.runtime.engine_build import BACKENDS, BackendChoice
from fedspine_edge.runtime.generation import Generation, Sampling, generate, pieces
from fedspine_edge.runtime.inputs import checked_tokens, random_tokens
from fedspine_edge.runtime.latency import (
    LatencyComparison,
    LatencyStatistics,
    compare_latency,
    latency_of,
    time_sessions,
)
from fedspine_edge.runtime.onnxruntime_runner import Runner, empty_past
from fedspine_edge.runtime.runner_selection import OpenedBundle, open_bundle
from fedspine_edge.runtime.text import Text, TextCodec, Words

__all__ = ["LatencyComparison", "LatencyStatistics", "Prediction", "Session", "WordLabel", "compare_latency"]

T = TypeVar("T")


class Session:
    """A loaded bundle. Safe to use from several threads; make one with `Session.load`.

    Attributes:
        backend: What runs the model: "onnxruntime", "tensorrt" or "tensorrt_rtx".
        why: One sentence on why it is that one.
        bundle: The checked bundle, with its manifest.
    """

    def __init__(self, opened: OpenedBundle) -> None:
        self.bundle, self.backend, self.why = opened.bundle, opened.backend, opened.why
        self._runner: Runner | None = opened.runner
        self._codec_lock = threading.Lock()
        self._adapter = bundled_adapter(self.bundle.folder, self.manifest)
        self._pool: ThreadPoolExecutor | None = None
        self._workers = 4
        self._unpacked: TemporaryDirectory[str] | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: BackendChoice = "auto",
        *,
        threads: int | None = None,
        spinning: bool = True,
        rebuild: bool = False,
    ) -> Session:
        """Checks a bundle and makes it ready to run.

        Args:
            bundle: Folder or .zip file that `compile_engine` made.
            backend: "auto" takes the engine where it fits this machine and ONNX Runtime otherwise; the other
                names take that backend or fail.
            threads: Threads within an operator of ONNX Runtime; None takes one per core. An engine ignores it.
            spinning: Whether ONNX Runtime's threads spin while they wait for work, which is fastest where nothing else
                needs the cores. False where other programs do: it makes the slowest runs much faster.
            rebuild: Where the bundle's engine is damaged, missing or does not fit this machine, build it anew from
                the bundle's own model.onnx (minutes, and the bundle must be writable) and take that.

        Raises:
            CheckpointError: The bundle is missing, truncated or altered.
            EngineIncompatible: An engine was asked for and does not fit; the remedy is the command to rebuild it.
            MissingDependency: The package that the backend needs is absent.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1.", remedy="Leave it out for one per core.")
        if not is_archive(bundle):
            return cls(
                open_bundle(Path(bundle), backend, threads=threads, spinning=spinning, rebuild=rebuild, archive=None)
            )
        unpacked = unpack(bundle)
        try:
            folder = Path(unpacked.name)
            session = cls(
                open_bundle(folder, backend, threads=threads, spinning=spinning, rebuild=rebuild, archive=Path(bundle))
            )
        except BaseException:
            unpacked.cleanup()
            raise
        session._unpacked = unpacked
        return session

    @property
    def manifest(self) -> BundleManifest:
        """What bundle.json says."""
        return self.bundle.manifest

    def run(self, **inputs: Array) -> Array:
        """Runs the model once.

        Args:
            inputs: Integer arrays of shape (batch, tokens), one per input of the model; `session.manifest.inputs`
                lists them. `token_type_ids` may be left out (zeros).

        Returns:
            float32 logits: (batch, labels) for classification, (batch, tokens, labels) for token classification and
            (batch, tokens, vocabulary) for a causal model.

        Raises:
            DataError: An input is missing, unknown, of the wrong type or shape, out of range, or too long.
        """
        return self.live_runner().run(self.checked_inputs(inputs))["logits"]

    def run_async(self, **inputs: Array) -> Future[Array]:
        """`run` on a thread of this session; the result or the error is in the future.

        In asyncio: `await asyncio.wrap_future(session.run_async(...))`. Inputs must not be changed meanwhile.
        """
        return self._submit(lambda: self.run(**inputs))

    def classify_async(self, text: Text | Sequence[Text], *, batch_size: int = 16) -> Future[Any]:
        """`classify` on a thread of this session; see `run_async`."""
        classify: Callable[..., Any] = self.classify
        return self._submit(lambda: classify(text, batch_size=batch_size))

    def label_words_async(self, words: Words | Sequence[Words], *, batch_size: int = 16) -> Future[Any]:
        """`label_words` on a thread of this session; see `run_async`."""
        label_words: Callable[..., Any] = self.label_words
        return self._submit(lambda: label_words(words, batch_size=batch_size))

    def generate_async(self, prompt: str | Sequence[int], **settings: Any) -> Future[Generation]:
        """`generate` on a thread of this session, with its settings; see `run_async`."""
        return self._submit(lambda: self.generate(prompt, **settings))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        with self._codec_lock:
            self.live_runner()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fedspine-session")
            pool = self._pool
        return pool.submit(work)

    def set_adapter(self, folder: str | Path | None) -> None:
        """Exchanges the adapter, and the task head that came with it, for all runs that start from now on.

        Needs a bundle compiled with `lora="inputs"`; nothing is rebuilt, any rank up to 64 will do. `None` goes
        back to the adapter in the bundle.

        Args:
            folder: Holds a PEFT adapter, such as `PrunableModel.save` and `EdgeTuner.save` write.

        Raises:
            DeployError: The bundle has its adapter merged into the weights.
            CheckpointError: The adapter is damaged or for another model. The one that was set stays.
        """
        default = bundled_adapter(self.bundle.folder, self.manifest)
        self._adapter = default if folder is None else read_adapter(folder, self.manifest, default)

    def adapter_inputs(self) -> dict[str, Array]:
        """The adapter that is set, as inputs of the model; empty where adapters are not inputs."""
        return self._adapter

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
        """Continues a text with a decoder.

        Args:
            prompt: A text, or its tokens. It is taken as it is: chat markup is the caller's.
            max_new_tokens: The answer's largest length in tokens.
            temperature: 0 takes the most likely token always; above, tokens are drawn.
            top_k: Draw only among the k most likely; 0 means all.
            top_p: Draw only among the most likely that together reach this probability.
            seed: Of the draws: the same seed gives the same text.
            stop: The text ends before the first of these strings.

        Raises:
            DeployError: The model does not generate, or the bundle has no tokenizer.
            DataError: The prompt is empty or too long.
            ConfigError: A setting cannot be used.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return generate(self, prompt, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)

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
        """`generate`, piece by piece as it comes; wrong arguments are refused before the first piece."""
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return pieces(self, prompt, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)

    def live_runner(self) -> Runner:
        """What runs the model. Raises `DeployError` after `close`."""
        runner = self._runner
        if runner is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return runner

    def checked_inputs(self, given: dict[str, Array]) -> dict[str, Array]:
        """`given` as the runner takes it, with an empty KV cache and the adapter that is set. Raises `DataError`."""
        checked = checked_tokens(self.manifest, given)
        return checked | empty_past(self.manifest.inputs, len(checked["input_ids"])) | self._adapter

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
        single = isinstance(text, (str, tuple))
        texts: list[Any] = [text] if single else list(text)
        predictions = classification.classify(self, texts, batch_size)
        return predictions[0] if single else predictions

    @overload
    def label_words(self, words: Words, *, batch_size: int = ...) -> list[WordLabel]: ...
    @overload
    def label_words(self, words: list[list[str]] | list[Words], *, batch_size: int = ...) -> list[list[WordLabel]]: ...
    def label_words(
        self, words: Words | Sequence[Words], *, batch_size: int = 16
    ) -> list[WordLabel] | list[list[WordLabel]]:
        """Labels every word of a text (a list of words), or of each of several texts, in the given order.

        A word's first token answers for it, as in training. Words are split as the training data were; what belongs
        together, "don't" for instance, is up to them. Several texts run as in `classify`.

        Raises `DataError` for anything else, for an empty text, for a word without tokens, and for a text longer than
        the model or its engine allows, which says how many of its words fit; `DeployError` when the model does not
        label words or the bundle has no tokenizer.json.
        """
        given: list[Any] = list(words)
        single = not isinstance(words, str) and bool(given) and isinstance(given[0], str)
        labelled = classification.label_words(self, [given] if single else given, batch_size)
        return labelled[0] if single else labelled

    def tokenize(self, texts: Sequence[Text]) -> dict[str, Array]:
        """The model's inputs for texts or pairs: cut to what the model and its engine allow, padded to the longest."""
        return self.codec.padded(self.encode(texts))

    def encode(self, texts: Sequence[Text]) -> list[Any]:
        """The tokenizer's encoding of every text or pair, cut to what the model and its engine allow."""
        return self._loaded_codec().encode(texts)

    def encode_words(self, texts: Sequence[Words]) -> list[Any]:
        """The tokenizer's encoding of every list of words. Raises `DataError` where one is too long."""
        return self._loaded_codec().encode_words(texts)

    def _loaded_codec(self) -> TextCodec:
        with self._codec_lock:  # the first call loads the tokenizer
            return self.codec

    @functools.cached_property
    def codec(self) -> TextCodec:
        """The bundle's tokenizer."""
        limit = self.live_runner().max_tokens
        return TextCodec(self.bundle, min(self.manifest.max_tokens, limit or self.manifest.max_tokens))

    def bench(self, batch: int = 1, tokens: int = 32, repeats: int = 100, *, warmup: int = 10) -> LatencyStatistics:
        """Times `repeats` runs on random tokens, after `warmup` runs that are not counted.

        Raises `DataError` for more tokens than the model allows.
        """
        inputs = self.random_inputs(batch, tokens)
        times = time_sessions([(self, inputs)], repeats, warmup)
        return latency_of(self.backend, batch, tokens, times[0])

    def random_inputs(self, batch: int, tokens: int) -> dict[str, Array]:
        """Random tokens of shape (batch, tokens) without padding, for timing."""
        return random_tokens(self.manifest, batch, tokens)

    def close(self) -> None:
        """Frees the engine or the ONNX Runtime session; calling it again does nothing."""
        with self._codec_lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
        if self._unpacked is not None:
            self._unpacked.cleanup()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
