"""Type aliases for numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Array of any dtype."""

Float64Array = npt.NDArray[np.float64]

Tensors = dict[str, Array]
"""Arrays by tensor name, as in a safetensors file."""
