"""Sums of low-rank products and their best rank-r factors, without building the products where that is cheaper.

`A` is (r, in) and `B` is (out, r), as in LoRA; a device's adapter stands for `dW = scaling · B · A`. Everything is
computed in float64 and handed out as float32. Source: docs/algorithms.md, "Aggregation".
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Shape = tuple[int, int]
"""(out_features, in_features) of the unpruned linear."""

DEAD = 1e-6
"""A component whose singular value is below this share of the largest carries noise, not an adapter."""

MAX_STACK_RANK = 1024
"""Rank past which a stack that cannot become dense is recompressed; bounds memory at (out + in) · this · 8 bytes."""


@dataclass(frozen=True)
class LowRank:
    """Best rank-r factors of a matrix, in singular-value order: the adapter of rank r' ≤ r is a prefix.

    Attributes:
        A: (r, in) float32.
        B: (out, r) float32.
        singular_values: (r,) float64, of dW.
        energy: (r,) float64; entry i is the share of the squared Frobenius norm of dW that rank i + 1 keeps.
    """

    A: Float32
    B: Float32
    singular_values: Array
    energy: Array


@dataclass(frozen=True)
class Decomposition:
    """`U · diag(S) · Vt`, with U (out, k), S (k,) descending and Vt (k, in); `total` is ‖·‖² of the whole."""

    U: Array
    S: Array
    Vt: Array
    total: float


class LowRankSum:
    """Σ w_k · B_k · A_k of one module, added one device at a time, each in its own compact coordinates.

    Held as stacked factors while their rank is below min(out, in), which is where the decomposition of the stack
    costs as many operations as a dense one: 4(out + in)R² + 22R³ against 2·out·in·R + 4·max·min² + 22·min³.
    From there it is a dense matrix, exactly, or, where that would be larger than `max_stack_rank` allows, a stack
    cut to its `max_stack_rank / 2` leading components; `discarded_share` tells what was lost that way.
    """

    def __init__(self, shape: Shape, *, max_stack_rank: int = MAX_STACK_RANK) -> None:
        self.shape = shape
        self.row_weight: Array = np.zeros(shape[0])
        self.col_weight: Array = np.zeros(shape[1])
        self.total_weight = 0.0
        self._discarded = 0.0
        self._max_stack_rank = max_stack_rank
        self._limit = min(*shape, max_stack_rank)
        self._left: list[Array] = []
        self._right: list[Array] = []
        self._rank = 0
        self._dense: Array | None = None

    @property
    def is_dense(self) -> bool:
        return self._dense is not None

    @property
    def discarded_share(self) -> float:
        """Squared norm lost by recompressing, as a share of lost and kept; 0 unless the stack outgrew its bound."""
        if self._discarded == 0.0:
            return 0.0
        left, right = self._stack()
        return self._discarded / (self._discarded + product_norm(right, left) ** 2)

    def add(
        self, weight: float, A: npt.NDArray[np.floating], B: npt.NDArray[np.floating], rows: Indices, cols: Indices
    ) -> None:
        """Add `weight · B · A`; `rows` and `cols` are the original indices of B's rows and A's columns."""
        self.total_weight += weight
        self.row_weight[rows] += weight
        self.col_weight[cols] += weight
        if weight == 0.0:
            return
        left, right = np.zeros((self.shape[0], A.shape[0])), np.zeros((A.shape[0], self.shape[1]))
        left[rows] = weight * B.astype(np.float64)
        right[:, cols] = A
        self._left.append(left)
        self._right.append(right)
        self._rank += A.shape[0]
        if self._rank >= self._limit:
            self._compress()

    def decompose(self, *, per_holder: bool = True) -> Decomposition:
        """The weighted mean, decomposed.

        With `per_holder` each row (or column, where those are pruned) is divided by the weight of the devices that
        hold it, and what nobody holds is zero; without, everything is divided by the weight of all devices.
        """
        if per_holder:
            row_scale, col_scale = _inverse(self.row_weight), _inverse(self.col_weight)
            partial_rows = bool((self.row_weight != self.total_weight).any())
            # A module loses rows or columns, never both: the other side is held by everyone.
            if partial_rows:
                col_scale = (self.col_weight > 0).astype(np.float64)
            else:
                row_scale = (self.row_weight > 0).astype(np.float64)
        else:
            row_scale = np.full(self.shape[0], _inverse(np.array([self.total_weight]))[0])
            col_scale = np.ones(self.shape[1])
        # Only what somebody holds takes part: in late rounds that is half of the matrix or less.
        rows, cols = np.flatnonzero(row_scale * self.row_weight), np.flatnonzero(col_scale * self.col_weight)
        if rows.size == 0 or cols.size == 0 or (self._dense is None and not self._left):
            return decompose_dense(np.zeros(self.shape))
        if self._dense is not None:
            dense = self._with_stack()[np.ix_(rows, cols)] * row_scale[rows, None] * col_scale[cols]
            small = decompose_dense(dense)
        else:
            left, right = self._stack()
            small = decompose_stack(left[rows] * row_scale[rows, None], right[:, cols] * col_scale[cols])
        return _placed(small, self.shape, rows, cols)

    def _stack(self) -> tuple[Array, Array]:
        return np.concatenate(self._left, axis=1), np.concatenate(self._right, axis=0)

    def _with_stack(self) -> Array:
        dense = np.zeros(self.shape) if self._dense is None else self._dense
        if not self._left:
            return dense
        left, right = self._stack()
        return dense + left @ right

    def _compress(self) -> None:
        if min(self.shape) <= self._max_stack_rank:
            self._dense = self._with_stack()
            self._left, self._right, self._rank = [], [], 0
            return
        whole = decompose_stack(*self._stack())
        kept = max(1, self._max_stack_rank // 2)
        self._discarded += float((whole.S[kept:] ** 2).sum())
        self._left, self._right = [whole.U[:, :kept] * whole.S[:kept]], [whole.Vt[:kept]]
        self._rank = self._left[0].shape[1]


def decompose_dense(matrix: Array) -> Decomposition:
    """Singular value decomposition with fixed signs; rows and columns of zeros stay exactly zero."""
    rows, cols = np.flatnonzero(matrix.any(axis=1)), np.flatnonzero(matrix.any(axis=0))
    if rows.size == 0:
        return Decomposition(np.zeros((matrix.shape[0], 0)), np.zeros(0), np.zeros((0, matrix.shape[1])), 0.0)
    U, S, Vt = np.linalg.svd(matrix[np.ix_(rows, cols)], full_matrices=False)
    return _placed(_signed(U, S, Vt), (matrix.shape[0], matrix.shape[1]), rows, cols)


def decompose_stack(left: Array, right: Array) -> Decomposition:
    """Singular value decomposition of `left @ right`, (out, R) and (R, in), through its (R, R) core."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, S, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _signed(q_left @ u, S, vt @ q_right.T)


def balanced(parts: Decomposition, *, r: int, scaling: float, name: str, seed: int) -> LowRank:
    """Factors `B = U·sqrt(S/scaling)`, `A = sqrt(S/scaling)·Vt` of rank r, every component able to learn.

    A component that carries nothing is not sent as zeros, which would keep both its gradients zero for ever:
    its row of A is seeded Kaiming, its column of B zero, so it adds nothing and still learns.
    """
    A, B = _fresh(name, (parts.U.shape[0], parts.Vt.shape[1]), r, seed)
    found = min(r, parts.S.size)
    singular_values = np.zeros(r)
    singular_values[:found] = parts.S[:found]
    live = np.flatnonzero(parts.S[:found] >= DEAD * parts.S[0]) if found and parts.S[0] > 0 else np.arange(0)
    root = np.sqrt(parts.S[live] / scaling)
    A[live] = root[:, None] * parts.Vt[live]
    B[:, live] = parts.U[:, live] * root
    kept = np.cumsum(singular_values**2)
    energy = np.minimum(kept / parts.total, 1.0) if parts.total > 0 else np.ones(r)
    return LowRank(A.astype(np.float32), B.astype(np.float32), singular_values, energy)


def initial_factors(shapes: Mapping[str, Shape], r_max: int, seed: int) -> dict[str, tuple[Float32, Float32]]:
    """Round 1's global adapter: (A, B) per module with A (r_max, in) seeded Kaiming-uniform and B (out, r_max) zero.

    The bound is 1/sqrt(in), that of `torch.nn.Linear` and of PEFT. Each module has its own stream, so adding or
    reordering modules changes no other's values.
    """
    fresh = {name: _fresh(name, shape, r_max, seed) for name, shape in shapes.items()}
    return {name: (A.astype(np.float32), B.astype(np.float32)) for name, (A, B) in fresh.items()}


def product_norm(A: npt.NDArray[np.floating], B: npt.NDArray[np.floating]) -> float:
    """Frobenius norm of B · A from the two (r, r) Gram matrices."""
    a, b = A.astype(np.float64), B.astype(np.float64)
    return float(np.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))))


def prefix_energy(A: Array, B: Array) -> Array:
    """(r,) share of ‖B·A‖² that each prefix explains, for factors that are not orthogonal.

    Entry i is 1 - ‖B·A - B[:, :i+1]·A[:i+1]‖² / ‖B·A‖², which is negative where later components cancel earlier.
    """
    gram = (B.T @ B) * (A @ A.T)
    total = float(gram.sum())
    if total <= 0:
        return np.ones(A.shape[0])
    rest = [float(gram[i:, i:].sum()) for i in range(1, A.shape[0])]
    return 1.0 - np.array([*rest, 0.0]) / total


def fresh_rows(name: str, in_features: int, r: int, seed: int) -> Array:
    """(r, in) seeded Kaiming-uniform rows of A for module `name`; the first rows do not depend on r."""
    stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    rows: Array = stream.uniform(-1.0, 1.0, size=(r, in_features))
    return rows / float(np.sqrt(in_features))


def _fresh(name: str, shape: Shape, r: int, seed: int) -> tuple[Array, Array]:
    return fresh_rows(name, shape[1], r, seed), np.zeros((shape[0], r))


def _placed(small: Decomposition, shape: Shape, rows: Indices, cols: Indices) -> Decomposition:
    """The decomposition of a matrix that has `small` at `rows` and `cols` and zeros elsewhere."""
    U, Vt = np.zeros((shape[0], small.S.size)), np.zeros((small.S.size, shape[1]))
    U[rows], Vt[:, cols] = small.U, small.Vt
    return Decomposition(U, small.S, Vt, small.total)


def _signed(U: Array, S: Array, Vt: Array) -> Decomposition:
    """Signs such that the largest entry of every row of Vt is positive: an SVD leaves them open."""
    peak = np.abs(Vt).argmax(axis=1)
    sign = np.where(Vt[np.arange(Vt.shape[0]), peak] < 0, -1.0, 1.0)
    return Decomposition(U * sign, S, Vt * sign[:, None], float((S**2).sum()))


def _inverse(weight: Array) -> Array:
    # Below this the inverse overflows; such a weight counts as none.
    return np.divide(1.0, weight, out=np.zeros_like(weight), where=weight > 1e-300)
