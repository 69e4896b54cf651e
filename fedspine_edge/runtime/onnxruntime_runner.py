"""What runs a bundle, behind one small interface; and ONNX Runtime, the runner that works everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import TensorInfo
from fedspine_edge.errors import DeployError, MissingDependency
from fedspine_edge.runtime.bf16_emulation import emulated_copy


def empty_past(tensors: Sequence[TensorInfo], batch: int) -> dict[str, Array]:
    """The KV cache of nothing: every cache input with 0 tokens."""
    sizes = {"batch": batch, "past": 0}
    return {t.name: np.zeros(t.sized(sizes), dtype=t.dtype) for t in tensors if t.kind == "past"}


def past_name(present: str) -> str:
    """The input that takes an output of the previous step: present.0.key → past_key_values.0.key."""
    return present.replace("present.", "past_key_values.", 1)


class Runner(Protocol):
    """Runs checked inputs; safe to call from several threads.

    `run` computes every output but the KV cache. `step` computes the logits of a decoder's next tokens, (batch,
    tokens, vocabulary) or with `last` those of the last token, (batch, 1, vocabulary): its inputs lack the cache,
    which is the opaque state that the step before returned (None at first). `forget` gives a state's memory back.

    `max_batch` and `max_tokens` are the largest shape it can take, None where only the model limits it.
    """

    max_batch: int | None
    max_tokens: int | None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]: ...
    def step(self, inputs: dict[str, Array], state: Any, *, last: bool = False) -> tuple[Array, Any]: ...
    def forget(self, state: Any) -> None: ...
    def close(self) -> None: ...


class OnnxRuntimeRunner:
    """model.onnx on ONNX Runtime's CPU provider.

    Args:
        model: The ONNX file.
        threads: Threads within an operator; None takes ONNX Runtime's default, one per core.
        spinning: Whether they spin while they wait for work: see `Session.load`.
    """

    max_batch: int | None = None
    max_tokens: int | None = None

    def __init__(self, model: Path, *, threads: int | None = None, spinning: bool = True) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency.of("onnxruntime", extra="export", purpose="Running a bundle") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def load(path: Path) -> Any:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        try:
            try:
                self._session: Any = load(model)
            except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:  # no bfloat16 kernels on the CPU
                with emulated_copy(model) as copy:
                    self._session = load(copy)
        except MissingDependency:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise DeployError(
                f"ONNX Runtime {onnxruntime.__version__} could not load {model}: {error}",
                remedy="Update onnxruntime, or export the model anew with an older opset (17).",
            ) from error
        self._value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._results = [name for name in self._outputs if not name.startswith("present.")]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._past = [
            (cache.name, kinds[cache.type], cache.shape)
            for cache in self._session.get_inputs()
            if cache.name.startswith("past_key_values.")
        ]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(self._results, self._live().run(self._results, inputs)))

    def step(
        self, inputs: dict[str, Array], state: dict[str, Any] | None, *, last: bool = False
    ) -> tuple[Array, dict[str, Any]]:
        feeds = {name: self._value(array) for name, array in inputs.items()}
        if state is None:
            batch = len(inputs["input_ids"])
            for name, kind, (_, heads, _, head_dim) in self._past:
                feeds[name] = self._value(np.zeros((batch, heads, 0, head_dim), kind))
        else:
            feeds |= state
        # The cache stays in ONNX Runtime's own memory from step to step: numpy would copy it twice.
        values = dict(zip(self._outputs, self._live().run_with_ort_values(self._outputs, feeds)))
        logits: Array = values.pop("logits").numpy()
        return logits[:, -1:] if last else logits, {past_name(name): value for name, value in values.items()}

    def forget(self, state: Any) -> None:
        """Nothing to do: the values go with their last reference."""

    def _live(self) -> Any:
        session = self._session
        if session is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return session

    def close(self) -> None:
        self._session = None
