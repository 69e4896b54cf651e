"""Sums of low-rank products and their best rank-r factors, without building the products where that is cheaper.

`A` is (r, in) and `B` is (out, r), as in LoRA; a device's adapter represents `dW = scaling · B · A`. Computations use
float64 and results are float32. Source: docs/concepts/aggregation.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedspine_edge.arrays import Float64Array

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Shape = tuple[int, int]
"""(out_features, in_features) of the unpruned linear."""

DEAD = 1e-6
"""Share of the largest singular value below which a component is noise."""

MAX_STACK_RANK = 1024
"""Rank above which a stack that cannot become dense is recompressed; limits memory to (out + in) · this · 8 bytes."""


@dataclass(frozen=True)
class LowRank:
    """Best rank-r factors of a matrix, in singular-value order: the adapter of rank r' ≤ r is a prefix.

    Attributes:
        A: (r, in) float32.
        B: (out, r) float32.
        explained_variance: (r,) float64; entry i is the share of the squared Frobenius norm of dW kept at rank i + 1.
    """

    A: Float32
    B: Float32
    explained_variance: Float64Array


@dataclass(frozen=True)
class Decomposition:
    """`U · diag(S) · Vt`, with U (out, k), S (k,) descending and Vt (k, in); `total` is its squared Frobenius norm."""

    U: Float64Array
    S: Float64Array
    Vt: Float64Array
    total: float


class LowRankSum:
    """Σ w_k · B_k · A_k of one module, added one device at a time, each in its own compact coordinates.

    The sum is a stack of factors while their rank is below min(out, in), where decomposing the stack costs as many
    operations as decomposing a dense matrix: 4(out + in)R² + 22R³ against 2·out·in·R + 4·max·min² + 22·min³. Above that
    rank it is a dense matrix, which is exact. Where a dense matrix would be larger than `max_stack_rank` allows, the
    stack is truncated to its `max_stack_rank / 2` leading components.
    """

    def __init__(self, shape: Shape, *, max_stack_rank: int = MAX_STACK_RANK) -> None:
        self.shape = shape
        self.row_weight: Float64Array = np.zeros(shape[0])
        self.col_weight: Float64Array = np.zeros(shape[1])
        self.total_weight = 0.0
        self._max_stack_rank = max_stack_rank
        self._limit = min(*shape, max_stack_rank)
        self._left: list[Float64Array] = []
        self._right: list[Float64Array] = []
        self._rank = 0
        self._dense: Float64Array | None = None

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
        """Return the decomposition of the weighted mean.

        Args:
            per_holder: Divide each row (or column, where those are pruned) by the weight of the devices that keep it,
                and set those that no device keeps to zero. Otherwise everything is divided by the weight of all
                devices.
        """
        if per_holder:
            row_scale, col_scale = _inverse(self.row_weight), _inverse(self.col_weight)
            partial_rows = bool((self.row_weight != self.total_weight).any())
            # A module loses rows or columns, never both: all devices keep the other side.
            if partial_rows:
                col_scale = (self.col_weight > 0).astype(np.float64)
            else:
                row_scale = (self.row_weight > 0).astype(np.float64)
        else:
            row_scale = np.full(self.shape[0], _inverse(np.array([self.total_weight]))[0])
            col_scale = np.ones(self.shape[1])
        # Only rows and columns that some device keeps: in late rounds half of the matrix or less.
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

    def _stack(self) -> tuple[Float64Array, Float64Array]:
        return np.concatenate(self._left, axis=1), np.concatenate(self._right, axis=0)

    def _with_stack(self) -> Float64Array:
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
        self._left, self._right = [whole.U[:, :kept] * whole.S[:kept]], [whole.Vt[:kept]]
        self._rank = self._left[0].shape[1]


def decompose_dense(matrix: Float64Array) -> Decomposition:
    """Return the singular value decomposition with fixed signs; rows and columns of zeros stay exactly zero."""
    rows, cols = np.flatnonzero(matrix.any(axis=1)), np.flatnonzero(matrix.any(axis=0))
    if rows.size == 0:
        return Decomposition(np.zeros((matrix.shape[0], 0)), np.zeros(0), np.zeros((0, matrix.shape[1])), 0.0)
    U, S, Vt = np.linalg.svd(matrix[np.ix_(rows, cols)], full_matrices=False)
    return _placed(_signed(U, S, Vt), (matrix.shape[0], matrix.shape[1]), rows, cols)


def decompose_stack(left: Float64Array, right: Float64Array) -> Decomposition:
    """Return the singular value decomposition of `left @ right`, (out, R) and (R, in), through its (R, R) core."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, S, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _signed(q_left @ u, S, vt @ q_right.T)


def balanced(parts: Decomposition, *, r: int, scaling: float, name: str, seed: int) -> LowRank:
    """Return factors `B = U·sqrt(S/scaling)`, `A = sqrt(S/scaling)·Vt` of rank r in which every component can learn.

    Zeros in both factors of a component would keep both of its gradients at zero. An empty component therefore has a
    seeded Kaiming row of A and a zero column of B: it contributes nothing and can still learn.

    Args:
        parts: Decomposition of dW.
        r: Rank of the factors.
        scaling: lora_alpha / r.
        name: Module name, which selects the random stream.
        seed: Seed for the rows of empty components.
    """
    A, B = _initial_pair(name, (parts.U.shape[0], parts.Vt.shape[1]), r, seed)
    found = min(r, parts.S.size)
    singular_values = np.zeros(r)
    singular_values[:found] = parts.S[:found]
    live = np.flatnonzero(parts.S[:found] >= DEAD * parts.S[0]) if found and parts.S[0] > 0 else np.arange(0)
    root = np.sqrt(parts.S[live] / scaling)
    A[live] = root[:, None] * parts.Vt[live]
    B[:, live] = parts.U[:, live] * root
    kept = np.cumsum(singular_values**2)
    explained = np.minimum(kept / parts.total, 1.0) if parts.total > 0 else np.ones(r)
    return LowRank(A.astype(np.float32), B.astype(np.float32), explained)


def initial_factors(shapes: Mapping[str, Shape], r_max: int, seed: int) -> dict[str, tuple[Float32, Float32]]:
    """Return the global adapter of the first round.

    It is (A, B) per module with A (r_max, in) seeded Kaiming-uniform and B (out, r_max) zero. The bound is 1/sqrt(in),
    as in `torch.nn.Linear` and PEFT. Each module has its own random stream, so adding or reordering modules does not
    change the values of others.
    """
    pairs = {name: _initial_pair(name, shape, r_max, seed) for name, shape in shapes.items()}
    return {name: (A.astype(np.float32), B.astype(np.float32)) for name, (A, B) in pairs.items()}


def product_norm(A: npt.NDArray[np.floating], B: npt.NDArray[np.floating]) -> float:
    """Return the Frobenius norm of B · A, computed from the two (r, r) Gram matrices."""
    a, b = A.astype(np.float64), B.astype(np.float64)
    return float(np.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))))


def prefix_explained_variance(A: Float64Array, B: Float64Array) -> Float64Array:
    """Return the (r,) shares of ‖B·A‖² that the prefixes explain, for factors that are not orthogonal.

    Entry i is 1 - ‖B·A - B[:, :i+1]·A[:i+1]‖² / ‖B·A‖², which is negative where later components cancel earlier.
    """
    gram = (B.T @ B) * (A @ A.T)
    total = float(gram.sum())
    if total <= 0:
        return np.ones(A.shape[0])
    rest = [float(gram[i:, i:].sum()) for i in range(1, A.shape[0])]
    return 1.0 - np.array([*rest, 0.0]) / total


def kaiming_rows(name: str, in_features: int, r: int, seed: int) -> Float64Array:
    """Return (r, in) seeded Kaiming-uniform rows of A for module `name`; the first rows do not depend on r."""
    stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    rows: Float64Array = stream.uniform(-1.0, 1.0, size=(r, in_features))
    return rows / float(np.sqrt(in_features))


def _initial_pair(name: str, shape: Shape, r: int, seed: int) -> tuple[Float64Array, Float64Array]:
    return kaiming_rows(name, shape[1], r, seed), np.zeros((shape[0], r))


def _placed(small: Decomposition, shape: Shape, rows: Indices, cols: Indices) -> Decomposition:
    """Return the decomposition of a matrix that has `small` at `rows` and `cols` and zeros elsewhere."""
    U, Vt = np.zeros((shape[0], small.S.size)), np.zeros((small.S.size, shape[1]))
    U[rows], Vt[:, cols] = small.U, small.Vt
    return Decomposition(U, small.S, Vt, small.total)


def _signed(U: Float64Array, S: Float64Array, Vt: Float64Array) -> Decomposition:
    """Fix the signs, which an SVD leaves open, so that the largest entry of every row of Vt is positive."""
    peak = np.abs(Vt).argmax(axis=1)
    sign = np.where(Vt[np.arange(Vt.shape[0]), peak] < 0, -1.0, 1.0)
    return Decomposition(U * sign, S, Vt * sign[:, None], float((S**2).sum()))


def _inverse(weight: Float64Array) -> Float64Array:
    # Below this limit the inverse overflows; such a weight counts as zero.
    return np.divide(1.0, weight, out=np.zeros_like(weight), where=weight > 1e-300)
