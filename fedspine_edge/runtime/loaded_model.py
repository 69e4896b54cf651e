"""A loaded bundle without its files: the runner, the tokenizer and the current adapter."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import Bundle
from fedspine_edge.errors import DeployError
from fedspine_edge.files import TOKENIZER
from fedspine_edge.runtime.adapters import bundled_adapter, read_adapter
from fedspine_edge.runtime.inputs import validate_tokens
from fedspine_edge.runtime.kv_cache import empty_kv_cache
from fedspine_edge.runtime.runner import Runner
from fedspine_edge.runtime.text import TextCodec


class LoadedModel:
    """Combines the parts of a loaded bundle that classification, generation and timing need.

    The tokenizer and the bundled adapter are read by the constructor, so that a loaded model does not depend on its
    folder. The tokenizer is parsed on first use.

    Args:
        bundle: A verified bundle.
        runner: Runner of its model.

    Attributes:
        manifest: Manifest of the bundle.
        adapter: The current adapter as inputs of the model; empty if adapters are not inputs.
    """

    def __init__(self, bundle: Bundle, runner: Runner) -> None:
        self.manifest = bundle.manifest
        self.adapter = self._bundled_adapter = bundled_adapter(bundle.folder, bundle.manifest)
        self._runner: Runner | None = runner
        self._name = str(bundle.source)
        self._tokenizer_json = bundle.read_bytes(TOKENIZER) if TOKENIZER in bundle.manifest.files else None
        self._codec: TextCodec | None = None
        self._codec_lock = threading.Lock()

    @property
    def runner(self) -> Runner:
        """The runner. Raises `DeployError` after `close`."""
        runner = self._runner
        if runner is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return runner

    @property
    def codec(self) -> TextCodec:
        """The tokenizer, limited to what the model and its engine allow. Raises `DeployError` if there is none."""
        with self._codec_lock:
            if self._codec is None:
                if self._tokenizer_json is None:
                    raise DeployError(
                        f"{self._name} has no {TOKENIZER}.",
                        remedy="Add the tokenizer's tokenizer.json to the model folder and compile it again, or "
                        "tokenize the text yourself and call run().",
                    )
                limit = self.runner.max_tokens or self.manifest.max_tokens
                self._codec = TextCodec(self._tokenizer_json, self.manifest, min(self.manifest.max_tokens, limit))
            return self._codec

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Validate the token inputs, run the model once and return its logits."""
        runner = self.runner
        return runner.run(self.model_inputs(inputs))["logits"]

    def model_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Validate token inputs, and add an empty KV cache and the current adapter. Raises `DataError`."""
        tokens = validate_tokens(self.manifest, inputs)
        return tokens | empty_kv_cache(self.manifest.inputs, len(tokens["input_ids"])) | self.adapter

    def set_adapter(self, folder: str | Path | None) -> None:
        """Replace the current adapter; see `Session.set_adapter`."""
        default = self._bundled_adapter
        self.adapter = default if folder is None else read_adapter(folder, self.manifest, default)

    def close(self) -> None:
        """Close the runner. Calling it again has no effect."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
