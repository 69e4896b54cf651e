"""Random numbers that are the same on every machine, whatever the versions of torch and numpy.

All devices of a fleet initialize the task head from the seed of the run, without exchanging it, so the bits must be
equal on x86 and ARM. The same holds for the adapter of a model that is trained on one device. Only numpy's raw bit
generator and its seeding are used, which numpy promises not to change, and a multiplication by a power of two, which is
exact. Distributions that need a logarithm or a cosine are avoided because libraries differ in the last bit.

The server initializes the adapter of a fleet with `Generator.uniform` in `aggregation/factored.py`. It may, because
devices receive the result instead of drawing it again.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> npt.NDArray[np.float32]:
    """Return float32 numbers, uniform in [-bound, bound), that depend on (seed, name) alone.

    They are filled in row-major order, so the first rows do not depend on the number of rows: a rank-4 matrix is the
    prefix of a rank-8 matrix.
    """
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    generator = np.random.PCG64(np.random.SeedSequence([seed, *words]))
    raw = generator.random_raw(int(np.prod(shape)))
    unit = (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values: npt.NDArray[np.float32] = ((2.0 * unit - 1.0) * bound).astype(np.float32)
    return values.reshape(shape)


def kaiming_uniform(seed: int, name: str, r: int, in_features: int) -> npt.NDArray[np.float32]:
    """Return an initial `lora_A` (r, in_features), uniform within 1/sqrt(in_features) as in PEFT and LoRA's own
    code."""
    return uniform(seed, f"{name}.lora_A", (r, in_features), in_features**-0.5)
