"""Clipping and noise on a device's update before it leaves; off unless configured. docs/privacy.md says what it gives.

What is clipped are the factors: the difference between what the device sends (A, B of every module and the task
head, as one long vector) and what it received, by L2 norm. Not the product B·A, which the server sees after
multiplication: a bound on the factors bounds it only together with the received factors. No ε is claimed, since
nothing here accounts for the number of rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def clip_and_add_noise(
    adapter: Mapping[str, npt.NDArray[np.float32]],
    received: Mapping[str, npt.NDArray[np.float32]],
    *,
    clip_norm: float,
    noise_std: float,
    seed: tuple[object, ...],
) -> dict[str, npt.NDArray[np.float32]]:
    """`adapter` with its difference from `received` clipped to `clip_norm` and Gaussian noise added.

    Args:
        adapter: What the device would send, by name.
        received: The same names and shapes before training.
        clip_norm: Largest L2 norm of the whole difference.
        noise_std: Standard deviation of the noise per element, as a multiple of `clip_norm`.
        seed: Anything that repeats when the round is repeated after a power loss. Whoever knows it can
            subtract the noise, so a part of it is a secret that never leaves the device.
    """
    difference = {name: value - received[name].astype(np.float32) for name, value in adapter.items()}
    norm = float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in difference.values())))
    shrink = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    words = np.frombuffer(hashlib.sha256(repr(seed).encode()).digest(), dtype="<u4")
    rng = np.random.default_rng(words)
    result = {}
    for name in sorted(difference):
        change = difference[name] * np.float32(shrink)
        if noise_std > 0:
            change = change + rng.normal(0.0, noise_std * clip_norm, change.shape).astype(np.float32)
        result[name] = received[name].astype(np.float32) + change
    return {name: result[name] for name in adapter}
