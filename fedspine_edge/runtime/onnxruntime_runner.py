"""Runs model.onnx on ONNX Runtime's CPU provider, which is available on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.errors import DeployError, MissingDependency
from fedspine_edge.runtime.bf16_emulation import emulated_copy
from fedspine_edge.runtime.cpu import thread_limit
from fedspine_edge.runtime.kv_cache import past_name


class OnnxRuntimeRunner:
    """Implements `Runner` with ONNX Runtime.

    Args:
        model: Path of the ONNX file.
        threads: Threads within an operator; None selects one per core that this process may use.
        spin_wait: Whether threads spin while they wait for work; see `Session.load`.
    """

    max_batch: int | None = None
    max_tokens: int | None = None

    def __init__(self, model: Path, *, threads: int | None = None, spin_wait: bool = True) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency.of("onnxruntime", extra="run", purpose="Running a bundle") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        threads = threads if threads is not None else thread_limit()
        if threads is not None:  # ONNX Runtime does not pin threads if their number is set
            options.intra_op_num_threads = threads
        if not spin_wait:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def load(path: Path) -> Any:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        try:
            try:
                self._session: Any = load(model)
            except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:  # the CPU has no bfloat16 kernels
                with emulated_copy(model) as copy:
                    self._session = load(copy)
        except MissingDependency:
            raise
        except Exception as error:  # onnxruntime's exceptions have no other common base class
            raise DeployError(
                f"ONNX Runtime {onnxruntime.__version__} could not load {model}: {error}",
                remedy="Update onnxruntime, or export the model again with an older opset (17).",
            ) from error
        self._to_value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._output_names = [output.name for output in self._session.get_outputs()]
        self._run_outputs = [name for name in self._output_names if not name.startswith("present.")]
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._past_inputs = [
            (tensor.name, dtypes[tensor.type], tensor.shape)
            for tensor in self._session.get_inputs()
            if tensor.name.startswith("past_key_values.")
        ]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(self._run_outputs, self._open_session().run(self._run_outputs, inputs)))

    def step(
        self, inputs: dict[str, Array], state: dict[str, Any] | None, *, last: bool = False
    ) -> tuple[Array, dict[str, Any]]:
        feeds = {name: self._to_value(array) for name, array in inputs.items()}
        if state is None:
            batch = len(inputs["input_ids"])
            for name, dtype, (_, heads, _, head_dim) in self._past_inputs:
                feeds[name] = self._to_value(np.zeros((batch, heads, 0, head_dim), dtype))
        else:
            feeds |= state
        # The cache stays in ONNX Runtime's memory from step to step; numpy arrays would be copied twice.
        values = dict(zip(self._output_names, self._open_session().run_with_ort_values(self._output_names, feeds)))
        logits: Array = values.pop("logits").numpy()
        return logits[:, -1:] if last else logits, {past_name(name): value for name, value in values.items()}

    def release(self, state: Any) -> None:
        """Do nothing: ONNX Runtime frees the values with their last reference."""

    def _open_session(self) -> Any:
        session = self._session
        if session is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return session

    def close(self) -> None:
        self._session = None
