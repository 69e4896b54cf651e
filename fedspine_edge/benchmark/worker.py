"""The process of one benchmark candidate, so that its memory is measured separately and torch is loaded only for torch.

It reads one JSON object per line from standard input and answers each with one; `benchmark.py` is the other side.

    {"do": "load", "kind": "bundle", "path": "...", "backend": "auto", "threads": 1, "spin_wait": false}
    {"do": "prepare", "batch": 1, "tokens": 32, "new_tokens": 0}
    {"do": "run"}                       # times one run; with new tokens, a prompt and its steps
    {"do": "run_for", "seconds": 5}     # runs continuously, for a slow power sensor
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


class LoadedCandidate(Protocol):
    """A loaded model that can be timed."""

    properties: dict[str, Any]

    def prepare(self, batch: int, tokens: int, new_tokens: int) -> None:
        """Create the inputs of the following runs."""

    def run(self) -> None:
        """Run a full pass."""

    def prompt(self) -> None:
        """Run the prompt, which fills the KV cache."""

    def token(self) -> None:
        """Run one token on the KV cache."""

    def end(self) -> None:
        """Free the KV cache."""


class BundleCandidate:
    """A bundle on one of its backends."""

    def __init__(self, path: str, backend: Any, threads: int | None, spin_wait: bool) -> None:
        self._session = Session.load(path, backend, threads=threads, spin_wait=spin_wait)
        self._model = self._session.model
        manifest = self._session.manifest
        self.properties = {
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
        random_tokens = self._session.random_inputs(batch, tokens)
        self._inputs = self._model.model_inputs(random_tokens)
        self._prompt = random_tokens | self._model.adapter
        self._next_token = random_tokens["input_ids"][:, :1].copy()

    def run(self) -> None:
        self._model.runner.run(self._inputs)

    def prompt(self) -> None:
        self._total = self._prompt["input_ids"].shape[1]
        _, self._state = self._model.runner.step(self._prompt, None, last=True)

    def token(self) -> None:
        self._total += 1
        mask = np.ones((len(self._next_token), self._total), np.int64)
        inputs = self._model.adapter | {"input_ids": self._next_token, "attention_mask": mask}
        _, self._state = self._model.runner.step(inputs, self._state, last=True)

    def end(self) -> None:
        self._model.runner.release(self._state)
        self._state = None


class TorchCandidate:
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
        except FedspineError:  # a folder that transformers saved
            model = load_base(folder)
        self._module = model.merge().eval()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._module.to(self._device)
        parameters = list(self._module.parameters())
        self.properties = {
            "backend": f"torch {torch.__version__} on {self._device}",
            "why": "as requested.",
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
        self._next_token = ids[:, :1]

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
        result = self._forward(input_ids=self._next_token, past_key_values=self._cache, use_cache=True)
        self._cache = result.past_key_values

    def end(self) -> None:
        self._cache = None


class Worker:
    """Executes the commands."""

    def __init__(self) -> None:
        self._candidate: Any = None
        self._new_tokens = 0

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """Execute one command and return the answer."""
        actions: Any = {"load": self._load, "prepare": self._prepare, "run": self._run, "run_for": self._run_for}
        answer: dict[str, Any] = actions[command.pop("do")](**command)
        return answer

    def _load(self, kind: str, path: str, backend: str, threads: int | None, spin_wait: bool) -> dict[str, Any]:
        start = time.perf_counter()
        if kind == "torch":
            self._candidate = TorchCandidate(path, threads)
        else:
            self._candidate = BundleCandidate(path, backend, threads, spin_wait)
        return {**self._candidate.properties, "load_s": time.perf_counter() - start}

    def _prepare(self, batch: int, tokens: int, new_tokens: int) -> dict[str, Any]:
        self._candidate.prepare(batch, tokens, new_tokens)
        self._new_tokens = new_tokens
        return {}

    def _run(self) -> dict[str, Any]:
        """Return wall and CPU times in ms of "run", or of "prompt" and "token" (the mean over the new tokens)."""
        candidate = self._candidate
        if not self._new_tokens:
            return {"run": _time_calls(candidate.run, 1)}
        try:
            return {
                "prompt": _time_calls(candidate.prompt, 1),
                "token": _time_calls(candidate.token, self._new_tokens),
            }
        finally:
            candidate.end()

    def _run_for(self, seconds: float) -> dict[str, Any]:
        start, runs = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            self._run()
            runs += 1
        return {"runs": runs, "seconds": time.perf_counter() - start}


def _time_calls(function: Any, count: int) -> list[float]:
    """Return the mean wall and CPU times of `count` calls, in milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        function()
    return [(time.perf_counter() - wall) / count * 1e3, (time.process_time() - cpu) / count * 1e3]


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    worker = Worker()
    answers = sys.stdout
    sys.stdout = sys.stderr  # output of libraries must not be mixed with the answers
    for line in sys.stdin:
        try:
            answer = worker.execute(json.loads(line))
        except FedspineError as error:
            answer = {"error": type(error).__name__, "message": error.message, "remedy": error.remedy}
        print(json.dumps({**answer, "peak_bytes": peak_bytes()}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
