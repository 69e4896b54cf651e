"""One folder, one run, one server."""

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


def test_a_changed_setting_is_named(tmp_path):
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
def test_operational_settings_may_change(tmp_path, changes):
    begin(make_config(tmp_path / "run"))
    RunDir(make_config(tmp_path / "run", **changes)).close()


def test_every_other_setting_is_pinned():
    flat = settings(msgspec.to_builtins(FleetConfig()))
    names = set(FleetConfig.__struct_fields__) - {"training", "bandit", "reward", "aggregation", "validation"}
    pinned = {name for name in flat if "." not in name}
    assert pinned == names - set(OPERATIONAL)
    assert "validation.max_norm" in flat
    assert "validation.keep_rejected" not in flat
    assert json.dumps(flat)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and contains no run .*'thesis.txt'"):
        RunDir(make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_second_server_is_kept_out(tmp_path):
    first = RunDir(make_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match="another server is using run_dir"):
        RunDir(make_config(tmp_path / "run"))
    first.close()
    RunDir(make_config(tmp_path / "run")).close()


def test_who_asks_whether_a_server_is_at_work_keeps_none_out(tmp_path):
    run = RunDir(make_config(tmp_path))
    assert is_server_running(tmp_path) is True
    run.close()
    assert is_server_running(tmp_path) is False
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.07, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        RunDir(make_config(tmp_path)).close()


def test_a_damaged_journal_is_a_clear_error(tmp_path):
    begin(make_config(tmp_path))
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, certainly" * 100)
    with pytest.raises(ConfigError, match=r"journal .* cannot be used"):
        RunDir(make_config(tmp_path))


def test_a_run_dir_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunDir(make_config(tmp_path / "run"))
