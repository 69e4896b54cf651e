"""One contestant of a benchmark, in a process of its own, so that its memory is its own and torch is only where it
is asked for. Reads one JSON object a line from standard input and answers each with one; `bench.py` is the other side.

    {"do": "load", "kind": "bundle", "path": "...", "backend": "auto", "threads": 1, "spinning": false}
    {"do": "prepare", "batch": 1, "tokens": 32, "new_tokens": 0}
    {"do": "turn"}                   # times one run, or with new tokens a prompt and its steps
    {"do": "spin", "seconds": 5}     # runs without pause, for a slow power sensor
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedspine_edge.errors import FedspineError
from fedspine_edge.runtime.inputs import check_length
from fedspine_edge.runtime.session import Session


class Contestant(Protocol):
    """What is timed."""

    about: dict[str, Any]

    def prepare(self, batch: int, tokens: int, new_tokens: int) -> None: ...
    def run(self) -> None: ...
    def prompt(self) -> None: ...
    def token(self) -> None: ...
    def end(self) -> None: ...


class BundleContestant:
    """A bundle on one of its backends."""

    def __init__(self, path: str, backend: Any, threads: int | None, spinning: bool) -> None:
        self._session = Session.load(path, backend, threads=threads, spinning=spinning)
        manifest = self._session.manifest
        self.about = {
            "backend": self._session.backend,
            "why": self._session.why,
            "task": manifest.task,
            "precision": manifest.precision,
            "sparsity": manifest.sparsity,
            "num_parameters": manifest.num_parameters,
            "size_bytes": self._session.bundle.size_bytes,
        }
        self._state: Any = None

    def prepare(self, batch: int, tokens: int, new_tokens: int) -> None:
        check_length(tokens, self._session.manifest.max_tokens, new_tokens)
        self._inputs = self._session.checked_inputs(self._session.random_inputs(batch, tokens))
        self._tokens = self._session.random_inputs(batch, tokens) | self._session.adapter_inputs()
        self._next = self._tokens["input_ids"][:, :1].copy()

    def run(self) -> None:
        self._session.live_runner().run(self._inputs)

    def prompt(self) -> None:
        self._total = self._tokens["input_ids"].shape[1]
        _, self._state = self._session.live_runner().step(self._tokens, None, last=True)

    def token(self) -> None:
        self._total += 1
        mask = np.ones((len(self._next), self._total), np.int64)
        inputs = self._session.adapter_inputs() | {"input_ids": self._next, "attention_mask": mask}
        _, self._state = self._session.live_runner().step(inputs, self._state, last=True)

    def end(self) -> None:
        self._session.live_runner().forget(self._state)
        self._state = None


class TorchContestant:
    """A saved model in eager torch."""

    def __init__(self, path: str, threads: int | None) -> None:
        import torch

        from fedspine_edge.model.checkpoint import load_model
        from fedspine_edge.model.loading import load_base
        from fedspine_edge.model.manifest import read_manifest

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        folder = Path(path)
        try:
            read_manifest(folder)
            model = load_model(folder)
        except FedspineError:  # a plain Hugging Face folder
            model = load_base(folder)
        self._module = model.merge().eval()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._module.to(self._device)
        parameters = list(self._module.parameters())
        self.about = {
            "backend": f"torch {torch.__version__} on {self._device}",
            "why": "as asked for.",
            "task": model.task,
            "precision": str(parameters[0].dtype).removeprefix("torch."),
            "sparsity": None,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "size_bytes": sum(parameter.nbytes for parameter in parameters),
        }

    def prepare(self, batch: int, tokens: int, new_tokens: int) -> None:
        from fedspine_edge.model.families import max_tokens_of

        check_length(tokens, max_tokens_of(self._module.config), new_tokens)
        ids = self._torch.randint(5, self._module.config.vocab_size, (batch, tokens), device=self._device)
        self._inputs = {"input_ids": ids, "attention_mask": self._torch.ones_like(ids)}
        self._next = ids[:, :1]

    def _forward(self, **inputs: Any) -> Any:
        with self._torch.inference_mode():
            result = self._module(**inputs)
            if self._device == "cuda":
                self._torch.cuda.synchronize()
            return result

    def run(self) -> None:
        self._forward(**self._inputs)

    def prompt(self) -> None:
        self._cache = self._forward(**self._inputs, use_cache=True, logits_to_keep=1).past_key_values

    def token(self) -> None:
        self._cache = self._forward(input_ids=self._next, past_key_values=self._cache, use_cache=True).past_key_values

    def end(self) -> None:
        self._cache = None


class Worker:
    """Carries out the commands."""

    def __init__(self) -> None:
        self._contestant: Any = None
        self._new_tokens = 0

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        action: Any = {"load": self._load, "prepare": self._prepare, "turn": self._turn, "spin": self._spin}
        answer: dict[str, Any] = action[command.pop("do")](**command)
        return answer

    def _load(self, kind: str, path: str, backend: str, threads: int | None, spinning: bool) -> dict[str, Any]:
        start = time.perf_counter()
        if kind == "torch":
            self._contestant = TorchContestant(path, threads)
        else:
            self._contestant = BundleContestant(path, backend, threads, spinning)
        return {**self._contestant.about, "load_s": time.perf_counter() - start}

    def _prepare(self, batch: int, tokens: int, new_tokens: int) -> dict[str, Any]:
        self._contestant.prepare(batch, tokens, new_tokens)
        self._new_tokens = new_tokens
        return {}

    def _turn(self) -> dict[str, Any]:
        """Wall and CPU milliseconds of every phase: "run", or "prompt" and "token" (the mean over the new tokens)."""
        contestant = self._contestant
        if not self._new_tokens:
            return {"run": _timed(contestant.run, 1)}
        try:
            phases = {"prompt": _timed(contestant.prompt, 1), "token": _timed(contestant.token, self._new_tokens)}
        finally:
            contestant.end()
        return phases

    def _spin(self, seconds: float) -> dict[str, Any]:
        start, turns = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._turn()
            turns += 1
        return {"turns": turns, "seconds": time.perf_counter() - start}


def _timed(call: Any, times: int) -> list[float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return [(time.perf_counter() - wall) / times * 1e3, (time.process_time() - cpu) / times * 1e3]


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    worker = Worker()
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a library prints must not come between the answers
    for line in sys.stdin:
        try:
            answer = worker.do(json.loads(line))
        except FedspineError as error:
            answer = {"error": type(error).__name__, "message": error.message, "remedy": error.remedy}
        print(json.dumps({**answer, "peak_bytes": peak_bytes()}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
