"""Text generation with a decoder: one pass over the prompt, then one step per token on the KV cache."""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.errors import ConfigError, DataError, DeployError
from fedspine_edge.runtime.inputs import require_number
from fedspine_edge.runtime.loaded_model import LoadedModel
from fedspine_edge.runtime.results import FinishReason, Generation
from fedspine_edge.runtime.text import TextStream


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Selection of the next token. Temperature 0 is greedy: it always selects the largest logit."""

    temperature: float = 0.0
    top_k: int = 0
    """Sample only from the k largest logits; 0 means all."""
    top_p: float = 1.0
    """Sample only from the smallest set of tokens whose probabilities sum to at least this value."""
    seed: int = 0
    """Seed of the random draws. The same seed, prompt and model give the same text."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            require_number(name, getattr(self, name), numbers.Real)
        for name in ("top_k", "seed"):
            require_number(name, getattr(self, name), numbers.Integral)
        if not (np.isfinite(self.temperature) and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"temperature {self.temperature}, top_k {self.top_k} and top_p {self.top_p} are not valid.",
                remedy="Give `temperature` ≥ 0, `top_k` ≥ 0 and `top_p` in (0, 1].",
            )
        if self.seed < 0:
            raise ConfigError(f"`seed` is {self.seed}.", remedy="Give at least 0.")

    def sampler(self) -> Callable[[Array], int]:
        """Return a function from logits (vocabulary,) to a token, which holds the random state of one text."""
        rng = np.random.default_rng(self.seed)
        return lambda logits: self._sample(logits, rng)

    def _sample(self, logits: Array, rng: np.random.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        # Sort by value and then by index, so that the order of equal logits is well defined.
        order = np.lexsort((np.arange(logits.size), -logits))
        if self.top_k:
            order = order[: self.top_k]
        # The difference is divided, because logits divided by a tiny temperature would overflow.
        values = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):
            weights = np.exp((values - values[0]) / self.temperature)
        weights /= weights.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        drawn = np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right")
        return int(order[drawn.clip(max=order.size - 1)])


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one generated text; see `Session.generate`."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_number("max_new_tokens", self.max_new_tokens, numbers.Integral)
        if not all(isinstance(text, str) for text in self.stop):
            raise ConfigError("`stop` contains a value that is not a string.", remedy="Give a string or several.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"`max_new_tokens` is {self.max_new_tokens}.", remedy="Give at least 1.")
        if "" in self.stop:
            raise ConfigError("A `stop` string is empty, so it would end every text at once.", remedy="Leave it out.")


@dataclass
class _Progress:
    """State of one text that is being generated."""

    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish: FinishReason = "length"
    first_token_ms: float = 0.0
    steps_s: float = 0.0


def generate(model: LoadedModel, prompt: str | Sequence[int], settings: GenerationSettings) -> Generation:
    """Generate a whole text; see `Session.generate`."""
    progress = _Progress()
    text = "".join(stream(model, prompt, settings, progress))
    later = len(progress.tokens) - 1
    return Generation(
        text=text,
        tokens=tuple(progress.tokens),
        prompt_tokens=progress.prompt_tokens,
        finish=progress.finish,
        first_token_ms=progress.first_token_ms,
        tokens_per_s=later / progress.steps_s if later > 0 and progress.steps_s > 0 else 0.0,
    )


def stream(
    model: LoadedModel,
    prompt: str | Sequence[int],
    settings: GenerationSettings,
    progress: _Progress | None = None,
) -> Iterator[str]:
    """Validate the arguments at once, and return an iterator over the pieces of the generated text."""
    if model.manifest.task != "causal_lm":
        raise DeployError(
            f"This bundle contains a {model.manifest.task} model, which cannot generate text.",
            remedy="Compile a causal language model.",
        )
    ids = _prompt_ids(model, prompt)
    return _pieces(model, ids, settings, progress or _Progress())


def _prompt_ids(model: LoadedModel, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = model.codec.encode([prompt])[0].ids
    else:
        is_sequence = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, (bytes, bytearray))
        if not is_sequence or not all(isinstance(token, numbers.Integral) for token in prompt):
            raise DataError("The prompt is neither a text nor token ids.", remedy="Give a str or a list of integers.")
        ids = [int(token) for token in prompt]
    limit = model.manifest.max_tokens
    vocabulary = model.manifest.inputs[0].limit or 2**63
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise DataError("The prompt is empty or contains a token outside the vocabulary.", remedy="Give a text.")
    if len(ids) >= limit:
        raise DataError(
            f"The prompt has {len(ids)} tokens; the model allows {limit}, including the answer.",
            remedy="Shorten the prompt.",
        )
    return list(ids)


def _pieces(model: LoadedModel, ids: list[int], settings: GenerationSettings, progress: _Progress) -> Iterator[str]:
    text_stream = TextStream(model.codec, settings.stop)
    progress.prompt_tokens = len(ids)
    with closing(_tokens(model, ids, settings, progress)) as tokens:
        for token in tokens:
            piece = text_stream.feed(token)
            if piece:
                yield piece
            if text_stream.stopped:
                progress.finish = "stop"
                return
    rest = text_stream.finish()
    if text_stream.stopped:
        progress.finish = "stop"
    if rest:
        yield rest


def _tokens(
    model: LoadedModel, ids: list[int], settings: GenerationSettings, progress: _Progress
) -> Generator[int, None, None]:
    """Yield tokens as they are selected. Closing the generator releases the memory of the KV cache."""
    runner, state = model.runner, None
    adapter = model.adapter  # one adapter for the whole text, even if another one is set meanwhile
    sample, end_tokens = settings.sampling.sampler(), frozenset(model.manifest.end_token_ids)
    tokens, total = np.array([ids], dtype=np.int64), len(ids)
    start = time.perf_counter()
    try:
        while len(progress.tokens) < settings.max_new_tokens and total <= model.manifest.max_tokens:
            inputs = {"input_ids": tokens, "attention_mask": np.ones((1, total), dtype=np.int64)}
            logits, state = runner.step(inputs | adapter, state, last=True)
            token = sample(logits[0, -1])
            if not progress.tokens:
                progress.first_token_ms = (time.perf_counter() - start) * 1e3
            if token in end_tokens:
                progress.finish = "end"
                return
            progress.tokens.append(token)
            progress.steps_s = time.perf_counter() - start - progress.first_token_ms / 1e3
            yield token
            tokens, total = np.array([[token]], dtype=np.int64), total + 1
    finally:
        runner.release(state)
