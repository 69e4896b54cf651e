"""Settings of an export, without the packages that the export itself needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedspine_edge.bundle.bundle import Precision
from fedspine_edge.data.loading import Data

Lora = Literal["merge", "inputs"]
ProgressCallback = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """Settings of the export of a model folder; see `compile_engine`.

    Attributes:
        precision: Precision of the ONNX model; int8 and fp8 need `calibrate`. None selects fp32 for a model folder and
            keeps the precision of a bundle.
        opset: ONNX opset, or None for the lowest one that supports the precision.
        lora: Whether to merge the adapter into the weights or to keep it as inputs of the model.
        labels: Class names, or None for those of the model.
        accept_mismatch: Whether to record a mismatch with torch instead of raising it.
        calibrate: The user's examples for calibration, accuracy and the default profile.
    """

    precision: Precision | None = None
    opset: int | None = None
    lora: Lora = "merge"
    labels: Sequence[str] | None = None
    calibrate: Data | None = None
    accept_mismatch: bool = False
