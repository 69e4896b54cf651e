"""Generating text with a decoder bundle: prompt once, then token by token on the KV cache. No torch.

for piece in session.stream("Once upon a time", max_new_tokens=50):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.errors import ConfigError, DataError, DeployError
from fedspine_edge.runtime.text import TextStream

if TYPE_CHECKING:
    from fedspine_edge.runtime.session import Session

Finish = Literal["end", "stop", "length"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Temperature 0 is greedy: the largest logit, always."""

    temperature: float = 0.0
    top_k: int = 0
    """Only the k largest logits; 0 means all."""
    top_p: float = 1.0
    """Only the smallest set of tokens whose probabilities reach this sum."""
    seed: int = 0
    """Same seed, prompt and model: same text."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"temperature {self.temperature}, top_k {self.top_k} and top_p {self.top_p} cannot be sampled with.",
                remedy="Give `temperature` ≥ 0, `top_k` ≥ 0 and `top_p` in (0, 1].",
            )
        if self.seed < 0:
            raise ConfigError(f"`seed` is {self.seed}.", remedy="Give at least 0.")

    def chooser(self) -> Callable[[Array], int]:
        """A function from logits (vocabulary,) to a token; it carries the random state of one text."""
        rng = np.random.default_rng(self.seed)
        return lambda logits: self._choose(logits, rng)

    def _choose(self, logits: Array, rng: np.random.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        # Sorted by value, then by index, so that equal logits cannot depend on the sort.
        order = np.lexsort((np.arange(logits.size), -logits))
        if self.top_k:
            order = order[: self.top_k]
        scaled = logits[order].astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled[0])
        weights /= weights.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        return int(
            order[
                np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right").clip(max=order.size - 1)
            ]
        )


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A generated text and how it came about; times are wall time on this machine."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: Finish
    """"end": the model ended the text; "stop": a stop string came; "length": max_new_tokens or the model's limit."""
    first_token_ms: float
    tokens_per_s: float
    """Of the tokens after the first; 0 when there is only one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


class _Run:
    """One text being generated; what is known of it so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.prompt_tokens = 0
        self.finish: Finish = "length"
        self.first_token_ms = 0.0
        self.steps_s = 0.0


def generate(session: Session, prompt: str | Sequence[int], **settings: Any) -> Generation:
    """All of `pieces` at once, with what is known of the run."""
    run = _Run()
    text = "".join(pieces(session, prompt, run=run, **settings))
    later = len(run.tokens) - 1
    return Generation(
        text=text,
        tokens=tuple(run.tokens),
        prompt_tokens=run.prompt_tokens,
        finish=run.finish,
        first_token_ms=run.first_token_ms,
        tokens_per_s=later / run.steps_s if later > 0 and run.steps_s > 0 else 0.0,
    )


def pieces(
    session: Session,
    prompt: str | Sequence[int],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str],
    run: _Run | None = None,
) -> Iterator[str]:
    """Text as it is generated; see `Session.generate` for the arguments and errors."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if max_new_tokens < 1:
        raise ConfigError(f"`max_new_tokens` is {max_new_tokens}.", remedy="Give at least 1.")
    if "" in stop:
        raise ConfigError("an empty `stop` string would end every text at once.", remedy="Leave it out.")
    if session.manifest.task != "causal_lm":
        raise DeployError(f"This bundle holds a {session.manifest.task} model, which does not generate.")
    ids = _prompt_ids(session, prompt)
    return _pieces(session, ids, sampling, max_new_tokens, stop, run or _Run())


def _prompt_ids(session: Session, prompt: str | Sequence[int]) -> list[int]:
    ids = session.codec.encode([prompt])[0].ids if isinstance(prompt, str) else [int(token) for token in prompt]
    limit = session.manifest.max_tokens
    vocabulary = session.manifest.inputs[0].limit or 2**63
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise DataError("The prompt is empty or holds a token outside the vocabulary.", remedy="Give a text.")
    if len(ids) >= limit:
        raise DataError(
            f"The prompt has {len(ids)} tokens; the model allows {limit}, the answer included.",
            remedy="Shorten the prompt.",
        )
    return list(ids)


def _pieces(
    session: Session, ids: list[int], sampling: Sampling, max_new_tokens: int, stop: Sequence[str], run: _Run
) -> Iterator[str]:
    choose, ends = sampling.chooser(), frozenset(session.manifest.end_token_ids)
    stream = TextStream(session.codec, stop)
    run.prompt_tokens = len(ids)
    with closing(_tokens(session, ids, choose, ends, max_new_tokens, run)) as tokens:
        for token in tokens:
            piece = stream.feed(token)
            if piece:
                yield piece
            if stream.stopped:
                run.finish = "stop"
                return
    rest = stream.finish()
    if stream.stopped:
        run.finish = "stop"
    if rest:
        yield rest


def _tokens(
    session: Session,
    ids: list[int],
    choose: Callable[[Array], int],
    ends: frozenset[int],
    max_new_tokens: int,
    run: _Run,
) -> Generator[int, None, None]:
    """Tokens as they are chosen; the cache's memory goes back when the caller stops asking."""
    runner, state = session.live_runner(), None
    adapter = session.adapter_inputs()  # one text, one adapter, whatever is set meanwhile
    tokens, total = np.array([ids], dtype=np.int64), len(ids)
    start = time.perf_counter()
    try:
        while len(run.tokens) < max_new_tokens and total <= session.manifest.max_tokens:
            inputs = {"input_ids": tokens, "attention_mask": np.ones((1, total), dtype=np.int64)}
            logits, state = runner.step(inputs | adapter, state, last=True)
            token = choose(logits[0, -1])
            if not run.tokens:
                run.first_token_ms = (time.perf_counter() - start) * 1e3
            if token in ends:
                run.finish = "end"
                return
            run.tokens.append(token)
            run.steps_s = time.perf_counter() - start - run.first_token_ms / 1e3
            yield token
            tokens, total = np.array([[token]], dtype=np.int64), total + 1
    finally:
        runner.forget(state)
