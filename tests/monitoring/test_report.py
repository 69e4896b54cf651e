"""HTML report and CSV export of a run."""

import csv
from pathlib import Path

import pytest
from recorded_fleet import run_recorded

from fedspine_edge.cli.main import main
from fedspine_edge.monitoring.csv_export import COLUMNS, flatten, write_csv
from fedspine_edge.monitoring.report import write_report
from fedspine_edge.monitoring.run_view import idle_by_device, idle_share
from fedspine_edge.server.journal.schema import DeviceView
from fedspine_edge.simulation.experiments.run_metrics import CURVE


def row(number: int, device_id: str, device_class: str, status: str = "ok", ratio: float = 0.0, r: int = 8, **figures):
    return DeviceView(number, 1, device_id, device_class, status, "", 0.5, ratio, r, **figures)


ROWS = [
    row(1, "agx-1", "agx", completion_time_s=2.0, time_kind="modelled", loss_before=0.7, loss_after=0.6, reward=0.4),
    row(1, "tx2-2", "tx2", r=16, completion_time_s=4.0, time_kind="modelled", accuracy_after=0.6, reward=0.2),
    row(2, "agx-1", "agx", ratio=0.2, completion_time_s=3.0, time_kind="modelled", reward_terms={"time": 0.9}),
    row(2, "tx2-2", "tx2", status="late", ratio=0.1, r=16),
]


def test_idle_share_counts_waiting_for_slowest_device() -> None:
    # Round 1: agx waits for half of its time, tx2 does not wait. Round 2: a single device does not wait.
    assert idle_share(ROWS) == pytest.approx((0.5 + 0.0 + 0.0) / 3)
    assert idle_by_device(ROWS) == {"agx-1": pytest.approx(0.25), "tx2-2": 0.0}
    assert idle_share([]) is None


def test_report_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    rows = [*ROWS, row(3, "x<script>", "nx", ratio=0.3, r=4, completion_time_s=1.0)]
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


def test_report_same_rows_gives_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / f"{i}.html", title="t", rows=ROWS, summary={}).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_csv_columns_are_documented(tmp_path: Path) -> None:
    with write_csv(tmp_path / "t.csv", list(COLUMNS), flatten(ROWS)).open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(COLUMNS)
    assert [(row["server_round"], row["device_id"], row["status"]) for row in found][-1] == ("2", "tx2-2", "late")
    assert found[2]["reward_time"] == "0.9"
    assert found[2]["reward_loss"] == ""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "tables.md").read_text()
    for columns in (COLUMNS, CURVE):
        for name, meaning in columns.items():
            assert f"| `{name}` | {meaning} |" in page


def test_report_command_with_csv_writes_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recorded(tmp_path / "run", mix={"nx": 2}, num_rounds=5)
    table = tmp_path / "table.csv"
    assert main(["report", str(tmp_path / "run"), "--csv", str(table)]) == 0
    assert capsys.readouterr().out == f"{table}\n"
    assert table.read_text().count("\n") == 1 + 5 * 2
    assert not (tmp_path / "run" / "report.html").exists()
