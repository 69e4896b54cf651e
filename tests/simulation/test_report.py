"""Rows to figures and to the HTML report."""

from pathlib import Path

import pytest

from fedspine_edge.simulation.report import write_report
from fedspine_edge.simulation.runview import DeviceRound, idle_by_device, idle_share

ROWS = [
    DeviceRound(1, "agx-1", "agx", "ok", 0.0, 8, 2.0, "modelled", 0.7, 0.6, 0.5, 0.4, {"time": 0.4}, 10, 20),
    DeviceRound(1, "tx2-2", "tx2", "ok", 0.0, 16, 4.0, "modelled", 0.7, 0.65, 0.6, 0.2, {"time": 0.2}, 10, 20),
    DeviceRound(2, "agx-1", "agx", "ok", 0.2, 8, 3.0, "modelled", 0.6, 0.5, 0.7, 0.9, {"time": 0.9}, 10, 20),
    DeviceRound(2, "tx2-2", "tx2", "late", 0.1, 16),
]


def test_idle_share_is_the_time_spent_waiting_for_the_slowest() -> None:
    # round 1: agx waits half of its time, tx2 not at all; round 2: one device alone waits for nobody
    assert idle_share(ROWS) == pytest.approx((0.5 + 0.0 + 0.0) / 3)
    assert idle_by_device(ROWS) == {"agx-1": pytest.approx(0.25), "tx2-2": 0.0}
    assert idle_share([]) is None


def test_report_is_self_contained_escapes_names_and_prints_only_what_was_measured(tmp_path: Path) -> None:
    rows = [*ROWS, DeviceRound(3, "x<script>", "nx", "ok", 0.3, 4, 1.0)]
    path = write_report(
        tmp_path / "report.html",
        title="A & B",
        rows=rows,
        summary={"accuracy_final": 0.761, "accuracy_unpruned": None},
        widths={"heads": [6, 5], "channels": [768, 760], "full_heads": 12, "full_channels": 1536},
    )
    page = path.read_text()
    assert "A &amp; B" in page
    assert "x<script>" not in page
    assert "76.1 %" in page
    assert "accuracy, unpruned" not in page
    assert page.count("<svg") == 7
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / f"{i}.html", title="t", rows=ROWS, summary={}).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]
