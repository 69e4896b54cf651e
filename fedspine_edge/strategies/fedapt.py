"""FedAPT: iterative pruning and tuning with one ratio and one rank for all, after APT (arXiv 2401.12200)."""

from __future__ import annotations

from fedspine_edge.strategies.fixed import Fixed


class FedAPT(Fixed):
    """All devices follow the fast edge of the pruning schedule, P (1 - (1 - x)³), which is APT's cubic schedule."""

    name = "fedapt"
    u = 1.0
