"""The run folder: one run and one server at a time."""

from __future__ import annotations

import fcntl
import json
import threading

import msgspec
import pytest
from fleet_fakes import make_config

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.server.run_dir import OPERATIONAL, RunDir, is_server_running, settings


def begin(config: FleetConfig) -> None:
    run = RunDir(config)
    run.journal.set_meta(run_id="r", config=msgspec.json.encode(config).decode())
    run.close()


def test_run_dir_with_a_changed_setting_names_it(tmp_path):
    begin(make_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"training.tau was 4, is 9") as caught:
        RunDir(make_config(tmp_path / "run", training={"tau": 9, "recovery_steps": 2}))
    assert "another run_dir" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"deadline_s": 5.0},
        {"min_reports": 2},
        {"broker": {"port": 8883}},
        {"gate": {"keep_rejected": 1}},
    ],
)
def test_run_dir_accepts_changed_operational_settings(tmp_path, changes):
    begin(make_config(tmp_path / "run"))
    RunDir(make_config(tmp_path / "run", **changes)).close()


def test_settings_contain_all_but_operational_ones():
    flat = settings(msgspec.to_builtins(FleetConfig()))
    names = set(FleetConfig.__struct_fields__) - {"training", "bandit", "reward", "aggregation", "validation"}
    pinned = {name for name in flat if "." not in name}
    assert pinned == names - set(OPERATIONAL)
    assert "validation.max_norm" in flat
    assert "validation.keep_rejected" not in flat
    assert json.dumps(flat)


def test_run_dir_with_foreign_files_is_rejected(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and contains no run .*'thesis.txt'"):
        RunDir(make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_run_dir_in_use_is_rejected(tmp_path):
    first = RunDir(make_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match="another server is using run_dir"):
        RunDir(make_config(tmp_path / "run"))
    first.close()
    RunDir(make_config(tmp_path / "run")).close()


def test_is_server_running_does_not_block_a_server(tmp_path):
    run = RunDir(make_config(tmp_path))
    assert is_server_running(tmp_path) is True
    run.close()
    assert is_server_running(tmp_path) is False
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.07, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        RunDir(make_config(tmp_path)).close()


def test_run_dir_with_a_damaged_journal_raises_config_error(tmp_path):
    begin(make_config(tmp_path))
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, certainly" * 100)
    with pytest.raises(ConfigError, match=r"journal .* cannot be used"):
        RunDir(make_config(tmp_path))


def test_run_dir_that_is_a_file_raises_config_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunDir(make_config(tmp_path / "run"))
