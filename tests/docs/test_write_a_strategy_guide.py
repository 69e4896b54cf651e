"""Runs the strategy in docs/guides/write-a-strategy.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedspine_edge import FleetConfig
from fedspine_edge.strategies import DeviceInfo

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "write-a-strategy.md"


def test_strategy_of_the_guide_assigns_the_rank_of_each_class() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    strategy = names["RankByClass"](FleetConfig())
    devices = [DeviceInfo("a", device_class="tx2"), DeviceInfo("b", device_class="agx"), DeviceInfo("c")]
    assignments = strategy.assign(devices, server_round=2)
    assert [assignments[device].r for device in "abc"] == [4, 16, 8]
    assert all(assignment.pruning_ratio > 0 for assignment in assignments.values())
