"""Clipping of a device's update, and noise on it, before it is sent. Both are off unless configured.

The L2 norm of the difference between the sent and the received tensors is clipped: A and B of every module and the task
head, as one vector. The product B·A, which the server computes, is not clipped itself; a bound on the factors bounds it
only together with the received factors. No ε is claimed, because the number of rounds is not accounted for.
See docs/concepts/privacy.md.
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
    """Return `adapter` with its difference from `received` clipped to `clip_norm`, and with Gaussian noise.

    Args:
        adapter: Tensors after training, by name.
        received: Tensors of the same names and shapes before training.
        clip_norm: Maximum L2 norm of the whole difference.
        noise_std: Standard deviation of the noise per element, as a multiple of `clip_norm`.
        seed: Seed for the noise, the same when the round is repeated after a power loss. With it the noise can be
            subtracted, so a part of it is a secret that never leaves the device.
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
