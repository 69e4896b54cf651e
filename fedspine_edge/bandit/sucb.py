"""S-UCB: a discounted UCB over a partition tree of arms (u, r), one tree per device.

The leaves of a tree partition [0, 1] × ranks. The leaf with the largest upper confidence bound is selected, the arm is
drawn uniformly inside it, and a leaf that was pulled twice is split in the middle. Source: FedSpine (arXiv 2501.02438),
after E-UCB of FedMP; the midpoint split and the inherited prior are original to this project. docs/concepts/s-ucb.md.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PRIOR_WEIGHT = 0.5
"""Discounted count of a mean that was inherited instead of observed."""

_EPS = 1e-6
_LEAST_WEIGHT = 1e-12
"""Lower limit of a discounted count, which keeps the bound finite."""


class Arm(NamedTuple):
    """One arm: `u` is the position in the pruning schedule of the round, `r` the LoRA rank."""

    u: float
    r: int


class _Pull(NamedTuple):
    u: float
    cell: int
    reward: float
    when: int


@dataclass
class _Leaf:
    """A box of the arm space, u in [u_lo, u_hi) and rank cells first..last-1.

    `weight` and `mean` are the discounted count and mean as of round `when`. In later rounds the mean is the same and
    the count shrinks by discount^(rounds passed), so they are updated only when needed.
    """

    u_lo: float
    u_hi: float
    first: int
    last: int
    weight: float = 0.0
    mean: float = 0.0
    when: int = 0
    count: int = 0
    """Pulls in this box, undiscounted."""
    pulls: list[_Pull] = field(default_factory=list)
    """Pulls to distribute when the box is split; empty once the box is too small to be split."""

    def holds(self, u: float, cell: int) -> bool:
        return self.first <= cell < self.last and (self.u_lo <= u < self.u_hi or u == self.u_hi == 1.0)


@dataclass
class _Tree:
    leaves: list[_Leaf]
    clock: int = 0
    """Round of the newest reward."""
    last: dict[str, Any] | None = None
    """The newest decision and its reason, for `explain`."""

    @property
    def count(self) -> int:
        return sum(leaf.count for leaf in self.leaves)


class SUCB:
    """The bandit of a whole fleet.

    A decision is a function of the state and `now` alone: repeating it gives the same arm, in any order of devices, and
    also after `from_dict(to_dict())` in another process.

    Args:
        ranks: LoRA ranks to choose from, ascending.
        discount: λ in (0, 1]; weight of a reward that is one round older. 1 never forgets.
        exploration: s, the width of the confidence bound.
        min_leaf_width: δ; a leaf is split only while its longest normalized side exceeds it.
        seed: Seed for breaking ties and for the draw inside a leaf.
        prior: With `class`, a device without rewards starts from what its class has learned.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        *,
        discount: float = 0.95,
        exploration: float = 0.2,
        min_leaf_width: float = 0.25,
        seed: int = 0,
        prior: Literal["none", "class"] = "none",
    ) -> None:
        if not ranks or list(ranks) != sorted(set(ranks)):
            raise ValueError(f"ranks is {list(ranks)}; it must be ascending, unique and not empty")
        if not 0.0 < discount <= 1.0:
            raise ValueError(f"discount is {discount}; it must be above 0 and at most 1")
        if exploration < 0.0 or min_leaf_width <= 0.0:
            raise ValueError(
                f"exploration {exploration} must not be negative and min_leaf_width {min_leaf_width} must be positive"
            )
        self.ranks = tuple(ranks)
        self.discount = discount
        self.exploration = exploration
        self.min_leaf_width = min_leaf_width
        self.seed = seed
        self.prior = prior
        self._trees: dict[str, _Tree] = {}
        self._class_trees: dict[str, _Tree] = {}
        self._class_of: dict[str, str] = {}

    def decide(
        self,
        device_id: str,
        *,
        device_class: str = "",
        feasible: Mapping[int, tuple[float, float]] | None = None,
        now: int | None = None,
    ) -> Arm:
        """Return the selected arm.

        Args:
            device_id: The device.
            device_class: Its hardware class.
            feasible: For each feasible rank the feasible interval of u; None allows everything.
            now: The round, which seeds the random draw; by default the round after the newest reward.

        Raises:
            ValueError: No arm is feasible.
        """
        self._class_of[device_id] = device_class
        tree = self._trees.get(device_id)
        if tree is None or tree.count == 0:
            tree = self._trees[device_id] = self._new_tree(device_class)
        now = tree.clock + 1 if now is None else now
        rng = random.Random(f"{self.seed}/{device_id}/{now}")

        boxes = [self._feasible_part(leaf, feasible) for leaf in tree.leaves]
        bounds = self._bounds(tree)
        open_leaves = [i for i, box in enumerate(boxes) if box]
        if not open_leaves:
            raise ValueError(f"no arm is feasible for {device_id!r}: {feasible}")
        largest = max(bounds[i] for i in open_leaves)
        best = [i for i in open_leaves if bounds[i] == largest]
        chosen = best[int(rng.random() * len(best))]
        arm = self._draw(boxes[chosen], rng)
        tree.last = {
            "now": now,
            "u": arm.u,
            "r": arm.r,
            "open": open_leaves,
            "why": self._why(tree, chosen, largest, ties=len(best), masked=len(boxes) - len(open_leaves)),
        }
        return arm

    def update(self, device_id: str, arm: Arm, reward: float, *, now: int | None = None) -> None:
        """Learn that `arm` gave `reward`, and split its leaf if it has been pulled twice.

        Args:
            device_id: The device.
            arm: The arm that was selected.
            reward: Reward in [0, 1].
            now: Round of the reward; by default the round after the newest.

        Raises:
            ValueError: A reward outside [0, 1], an unknown rank, or a round before the newest.
        """
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"reward of {device_id!r} is {reward}; it must be within 0..1")
        if arm.r not in self.ranks or not 0.0 <= arm.u <= 1.0:
            raise ValueError(f"{arm} is not in the arm space 0..1 × {list(self.ranks)}")
        tree = self._trees.setdefault(device_id, self._root())
        self._learn(tree, arm, reward, now)
        if self.prior == "class" and (name := self._class_of.get(device_id)):
            shared = self._class_trees.setdefault(name, self._root())
            # Rewards of one class may arrive out of order when a device was late; they count as of the newest round.
            self._learn(shared, arm, reward, None if now is None else max(now, shared.clock))

    def explain(self, device_id: str) -> dict[str, Any]:
        """Return the device's leaves with raw and discounted counts, means and bounds, and the newest decision.

        A bound of None is infinite: the root was never pulled. `open` is whether the leaf is feasible in the round that
        is being decided, or None between rounds.
        """
        tree = self._trees.get(device_id) or self._root()
        decided = tree.last if tree.last is not None and tree.last["now"] > tree.clock else None
        leaves = [
            {
                "u": [leaf.u_lo, leaf.u_hi],
                "ranks": list(self.ranks[leaf.first : leaf.last]),
                "pulls": leaf.count,
                "weight": self._weight(leaf, tree.clock),
                "mean": leaf.mean,
                "bound": bound if math.isfinite(bound) else None,
                "open": None if decided is None else number in decided.get("open", ()),
            }
            for number, (leaf, bound) in enumerate(zip(tree.leaves, self._bounds(tree)))
        ]
        return {"device_id": device_id, "pulls": tree.count, "leaves": leaves, "last": tree.last}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole state, as plain JSON data."""
        return {
            "ranks": list(self.ranks),
            "discount": self.discount,
            "exploration": self.exploration,
            "min_side": self.min_leaf_width,  # the name in journals of earlier versions
            "seed": self.seed,
            "prior": self.prior,
            "trees": {name: _tree_to_dict(tree) for name, tree in self._trees.items()},
            "class_trees": {name: _tree_to_dict(tree) for name, tree in self._class_trees.items()},
            "class_of": dict(self._class_of),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SUCB:
        """Return the inverse of `to_dict`."""
        settings = {name: data[name] for name in ("discount", "exploration", "seed", "prior")}
        bandit = cls(data["ranks"], min_leaf_width=data["min_side"], **settings)
        bandit._trees = {name: _tree_from_dict(tree) for name, tree in data["trees"].items()}
        bandit._class_trees = {name: _tree_from_dict(tree) for name, tree in data["class_trees"].items()}
        bandit._class_of = dict(data["class_of"])
        return bandit

    # The tree

    def _root(self) -> _Tree:
        return _Tree([_Leaf(0.0, 1.0, 0, len(self.ranks))])

    def _new_tree(self, device_class: str) -> _Tree:
        """Return a root, or the partition of the class with its means as priors."""
        shared = self._class_trees.get(device_class) if self.prior == "class" else None
        if shared is None or shared.count == 0:
            return self._root()
        leaves = [
            _Leaf(
                leaf.u_lo,
                leaf.u_hi,
                leaf.first,
                leaf.last,
                weight=min(PRIOR_WEIGHT, self._weight(leaf, shared.clock)),
                mean=leaf.mean,
                when=shared.clock,
            )
            for leaf in shared.leaves
        ]
        return _Tree(leaves, clock=shared.clock)

    def _weight(self, leaf: _Leaf, clock: int) -> float:
        """Return N_t(λ, leaf)."""
        return leaf.weight * self.discount ** (clock - leaf.when)

    def _bounds(self, tree: _Tree) -> list[float]:
        """Return U_t of every leaf; infinite only for a root that was never pulled."""
        weights = [self._weight(leaf, tree.clock) for leaf in tree.leaves]
        spread = 2.0 * math.log(max(math.fsum(weights), 1.0 + _EPS))
        return [
            math.inf
            if leaf.weight == 0.0
            else leaf.mean + self.exploration * math.sqrt(spread / max(weight, _LEAST_WEIGHT))
            for leaf, weight in zip(tree.leaves, weights)
        ]

    def _learn(self, tree: _Tree, arm: Arm, reward: float, now: int | None) -> None:
        now = tree.clock + 1 if now is None else now
        if now < tree.clock:
            raise ValueError(f"a reward of round {now} came after one of round {tree.clock}")
        tree.clock = now
        cell = self.ranks.index(arm.r)
        position = next(i for i, leaf in enumerate(tree.leaves) if leaf.holds(arm.u, cell))
        leaf = tree.leaves[position]
        old = self._weight(leaf, now)
        leaf.mean = (leaf.mean * old + reward) / (old + 1.0)
        leaf.weight, leaf.when, leaf.count = old + 1.0, now, leaf.count + 1
        along = self._longest_side(leaf)
        if along is None:
            return
        leaf.pulls.append(_Pull(arm.u, cell, reward, now))
        if leaf.count >= 2:
            tree.leaves[position : position + 1] = self._split(leaf, along)

    def _longest_side(self, leaf: _Leaf) -> Literal["u", "rank"] | None:
        """Return the side to split, or None for a leaf that is small enough. A single rank cannot be split."""
        cells = leaf.last - leaf.first
        rank_side = cells / len(self.ranks) if cells > 1 else 0.0
        u_side = leaf.u_hi - leaf.u_lo
        if max(rank_side, u_side) <= self.min_leaf_width:
            return None
        return "rank" if rank_side > u_side else "u"

    def _split(self, leaf: _Leaf, along: Literal["u", "rank"]) -> list[_Leaf]:
        if along == "u":
            middle = (leaf.u_lo + leaf.u_hi) / 2
            halves = [
                _Leaf(leaf.u_lo, middle, leaf.first, leaf.last),
                _Leaf(middle, leaf.u_hi, leaf.first, leaf.last),
            ]
        else:
            between = (leaf.first + leaf.last) // 2
            halves = [
                _Leaf(leaf.u_lo, leaf.u_hi, leaf.first, between),
                _Leaf(leaf.u_lo, leaf.u_hi, between, leaf.last),
            ]
        for half in halves:
            inside = [pull for pull in leaf.pulls if half.holds(pull.u, pull.cell)]
            if inside:
                # Relative to its newest pull, so that no count can underflow to zero.
                half.when = max(pull.when for pull in inside)
                shares = [self.discount ** (half.when - pull.when) for pull in inside]
                half.weight = math.fsum(shares)
                half.mean = math.fsum(s * pull.reward for s, pull in zip(shares, inside)) / half.weight
            else:
                half.when, half.weight, half.mean = leaf.when, PRIOR_WEIGHT, leaf.mean
            half.count = len(inside)
            half.pulls = inside if self._longest_side(half) else []
        return halves

    def _feasible_part(
        self, leaf: _Leaf, feasible: Mapping[int, tuple[float, float]] | None
    ) -> list[tuple[int, float, float]]:
        """Return (rank, u_lo, u_hi) of every feasible interval of the leaf."""
        intervals = []
        for r in self.ranks[leaf.first : leaf.last]:
            allowed = (0.0, 1.0) if feasible is None else feasible.get(r, (1.0, 0.0))
            u_lo, u_hi = max(leaf.u_lo, allowed[0]), min(leaf.u_hi, allowed[1])
            if u_lo < u_hi:
                intervals.append((r, u_lo, u_hi))
        return intervals

    def _draw(self, intervals: list[tuple[int, float, float]], rng: random.Random) -> Arm:
        """Draw an arm uniformly from the feasible part of a leaf."""
        left = rng.random() * math.fsum(u_hi - u_lo for _, u_lo, u_hi in intervals)
        for r, u_lo, u_hi in intervals:
            if left < u_hi - u_lo:
                return Arm(min(u_lo + left, math.nextafter(u_hi, u_lo)), r)
            left -= u_hi - u_lo
        r, u_lo, u_hi = intervals[-1]
        return Arm(math.nextafter(u_hi, u_lo), r)

    def _why(self, tree: _Tree, chosen: int, bound: float, *, ties: int, masked: int) -> str:
        leaf = tree.leaves[chosen]
        ranks = "/".join(str(r) for r in self.ranks[leaf.first : leaf.last])
        text = f"u in [{leaf.u_lo:g}, {leaf.u_hi:g}] with rank {ranks}: "
        if math.isinf(bound):
            text += "no arm was pulled yet"
        else:
            source = f"{leaf.count} pulls" if leaf.count else "inherited, never pulled"
            text += f"largest bound {bound:.3f} = mean {leaf.mean:.3f} + {bound - leaf.mean:.3f} ({source})"
        if ties > 1:
            text += f", drawn from {ties} equal leaves"
        if masked:
            text += f", {masked} leaves were not feasible"
        return text


def _tree_to_dict(tree: _Tree) -> dict[str, Any]:
    leaves = [
        [x.u_lo, x.u_hi, x.first, x.last, x.weight, x.mean, x.when, x.count, [list(pull) for pull in x.pulls]]
        for x in tree.leaves
    ]
    return {"clock": tree.clock, "leaves": leaves, "last": None if tree.last is None else dict(tree.last)}


def _tree_from_dict(data: Mapping[str, Any]) -> _Tree:
    leaves = [_Leaf(*[*values, [_Pull(*pull) for pull in pulls]]) for *values, pulls in data["leaves"]]
    return _Tree(leaves, clock=data["clock"], last=None if data["last"] is None else dict(data["last"]))
