"""Simulated fleets: they prune to the target and are repeatable bit for bit."""

import re
from pathlib import Path

import msgspec
import pytest
from recorded_fleet import RECORD, recorded_fleet

from fedspine_edge.cli.main import main
from fedspine_edge.config import DeviceConfig
from fedspine_edge.demo.setup import FleetInputs, FleetSetup, write_fleet
from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.export.fleet_model import build_finished_model, load_fleet_model
from fedspine_edge.model.layout import Layout
from fedspine_edge.monitoring.run_view import by_round, read_run
from fedspine_edge.server.server import RunResult
from fedspine_edge.simulation.data_shares import prepare_data
from fedspine_edge.simulation.replay import ReplayContext
from fedspine_edge.simulation.virtual_fleet import simulate, simulate_recorded


def small_fleet(folder: Path, model: Path, data: Path, **settings: object) -> FleetSetup:
    shares, test_csv = prepare_data(folder / "data", num_devices=3, data=data, test_examples=40)
    return write_fleet(
        folder,
        FleetInputs(model, shares, test_csv, num_labels=2, holdout=16),
        time_kind="simulated",
        port=1,
        num_rounds=5,
        min_devices=3,
        round_to=4,
        ranks=[2, 4],
        training={"tau": 3, "recovery_steps": 2, "batch_size": 4, "max_length_tokens": 16},
        **settings,
    )


def run(setup: FleetSetup) -> RunResult:
    return simulate(setup.fleet, setup.devices)


@pytest.mark.parametrize("layout", ["consensus", "local"])
def test_same_seed_gives_same_adapter(tmp_path: Path, tiny_model: Path, tiny_csv: Path, layout: str) -> None:
    results = [
        run(small_fleet(tmp_path / name, tiny_model, tiny_csv, layout=layout, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert results[0].adapter_sha256 == results[1].adapter_sha256
    assert results[0].adapter_sha256 != results[2].adapter_sha256


def test_global_scope_gives_layers_of_different_width(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    settings = {"layout": "local", "scope": "global", "criterion": "apt", "pruning_ratio": 0.5}
    setup = small_fleet(tmp_path, tiny_model, tiny_csv, **settings)
    result = run(setup)
    assert result.pruning_ratio == pytest.approx(0.5, abs=0.1)
    rows = read_run(Path(setup.fleet.run_dir)).rows
    assert {row.status for row in rows} == {"ok"}
    final = load_fleet_model(Path(setup.fleet.run_dir) / "final", tiny_model)
    assert len(set(final.layout.counts)) > 1


def test_global_scope_with_consensus_layout_raises(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    with pytest.raises(ConfigError, match='needs layout "local"'):
        small_fleet(tmp_path, tiny_model, tiny_csv, scope="global")


def test_run_prunes_to_target_and_model_is_built(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    setup = small_fleet(tmp_path, tiny_model, tiny_csv, pruning_ratio=0.5)
    result = run(setup)
    view = read_run(Path(setup.fleet.run_dir))
    assert view.state == "finished"
    assert [len(rows) for rows in by_round(view.rows).values()] == [3] * 5
    assert {row.time_kind for row in view.rows} == {"simulated"}
    assert result.pruning_ratio == pytest.approx(0.5, abs=0.1)

    finished = build_finished_model(Path(setup.fleet.run_dir), tiny_model, tmp_path / "model")
    assert finished.layout.pruning_ratio == result.pruning_ratio
    assert view.widths == finished.widths
    dense = build_finished_model(Path(setup.fleet.run_dir), tiny_model, tmp_path / "dense", pruned=False)
    assert dense.layout.counts == Layout.full(dense.layout.spec).counts
    assert finished.num_parameters < dense.num_parameters


def test_slow_class_takes_longer(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    setup = small_fleet(tmp_path, tiny_model, tiny_csv)
    run(setup)
    first = by_round(read_run(Path(setup.fleet.run_dir)).rows)[1]
    times = {row.device_class: (row.completion_time_s, row.r) for row in first}
    assert times["tx2"][0] > times["agx"][0]


def test_damaged_or_foreign_run_raises(tmp_path: Path, tiny_model: Path, tiny_csv: Path) -> None:
    with pytest.raises(ConfigError, match="contains no finished run"):
        build_finished_model(tmp_path, tiny_model, tmp_path / "model")
    setup = small_fleet(tmp_path, tiny_model, tiny_csv)
    run(setup)
    adapter = Path(setup.fleet.run_dir) / "final" / "adapter.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="hash differs"):
        build_finished_model(Path(setup.fleet.run_dir), tiny_model, tmp_path / "model")
    adapter.write_bytes(content)
    import tiny_bert

    other = tmp_path / "other"
    tiny_bert.write_model(other, seed=1)
    with pytest.raises(CheckpointError, match="is not the model that the fleet trained"):
        build_finished_model(Path(setup.fleet.run_dir), other, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_run_with_other_devices_or_data_raises(tmp_path: Path) -> None:
    data = tmp_path / "a.csv"
    data.write_text("text,label\n")
    fleet, devices = recorded_fleet(tmp_path, {"tx2": 1, "agx": 1}, num_rounds=5)
    devices = tuple(with_data(device, data) for device in devices)
    before = simulate_recorded(fleet, devices, ReplayContext(RECORD))
    moved = data.rename(tmp_path / "b.csv")
    same = [with_data(device, moved) for device in devices]
    assert simulate_recorded(fleet, same, ReplayContext(RECORD)) == before
    renamed = msgspec.structs.replace(devices[1], device_id="tx2-9")
    slower = msgspec.structs.replace(devices[1], up_mbit_s=1.0)
    for others, message in (
        ([devices[0], renamed], "device 'tx2-2' is missing (one of 2 devices)"),
        ([devices[0], slower], "configuration of device 'tx2-2' differs"),
    ):
        others = [with_data(device, moved) for device in others]
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            simulate_recorded(fleet, others, ReplayContext(RECORD))
        assert "another folder" in error.value.remedy
    moved.write_text("text,label\nnew,1\n")
    with pytest.raises(ConfigError, match=r"data of device 'agx-1' differs \(one of 2"):
        simulate_recorded(fleet, same, ReplayContext(RECORD))


def test_other_folder_is_left_unchanged(tmp_path: Path) -> None:
    fleet, devices = recorded_fleet(tmp_path, {"agx": 1}, num_rounds=5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="letter"):
        simulate_recorded(fleet, devices, ReplayContext(RECORD))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["letter.txt"]


def with_data(device: DeviceConfig, path: Path) -> DeviceConfig:
    return msgspec.structs.replace(device, data=msgspec.structs.replace(device.data, path=str(path)))


def test_simulate_other_split_raises_and_keeps_shares(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fleet.toml").write_text(
        "num_rounds = 5\npruning_ratio = 0.4\nranks = [2]\nround_to = 4\n"
        "training = { tau = 1, recovery_steps = 1, batch_size = 4, max_length_tokens = 16 }\n"
    )
    command = ["simulate", "--config", str(tmp_path / "fleet.toml"), "--mix", "nx=2", "--model", str(tiny_model)]
    command += ["--data", str(tiny_csv), "--out", str(tmp_path / "out"), "--dirichlet"]
    assert main([*command, "0.5"]) == 0
    shares = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    assert main([*command, "5"]) == 2
    assert "data of device 'nx-1' " in capsys.readouterr().err
    assert shares == {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    assert main([*command, "0.5"]) == 0
