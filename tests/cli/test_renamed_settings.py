"""Settings by their old names: accepted with one warning each, and refused beside the new name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedspine_edge.config import (
    RENAMED_SETTINGS,
    RENAMED_VALUES,
    DeviceConfig,
    FleetConfig,
    convert,
    load_config,
    with_current_names,
)
from fedspine_edge.errors import ConfigError
from fedspine_edge.server.run_dir import RunDir

DEVICE = {"device_id": "d", "model": "m", "data": {"path": "train.csv"}}
VALUES: dict[str, Any] = {"gate": {"max_norm": 5.0}, "simulated.drop_out": 0.1}


def nested(name: str, value: Any) -> dict[str, Any]:
    section, _, key = name.rpartition(".")
    return {section: {key: value}} if section else {key: value}


def read(data: dict[str, Any]) -> FleetConfig | DeviceConfig:
    return convert({**DEVICE, **data}, DeviceConfig) if "simulated" in data else convert(data, FleetConfig)


def value_of(config: FleetConfig | DeviceConfig, name: str) -> Any:
    found: Any = msgspec.to_builtins(config)
    for key in name.split("."):
        found = found[key]
    return found


@pytest.mark.parametrize("old", RENAMED_SETTINGS)
def test_old_setting_loads_with_one_warning(old: str, caplog: pytest.LogCaptureFixture) -> None:
    new, value = RENAMED_SETTINGS[old], VALUES.get(old, 0.3)
    config = read(nested(old, value))
    found = value_of(config, new)
    assert found == value if not isinstance(value, dict) else value.items() <= found.items()
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"`{old}` is now called `{new}`" in warning.getMessage()
    assert read(nested(new, value)) == config
    assert len(caplog.records) == 1  # the new name gives no warning


@pytest.mark.parametrize("old", RENAMED_SETTINGS)
def test_old_and_new_setting_together_raise(old: str, tmp_path: Path) -> None:
    new = RENAMED_SETTINGS[old]
    data = nested(old, VALUES.get(old, 0.3))
    both = {**data, **nested(new, {})} if "." not in old else {k: v | nested(new, 0.3)[k] for k, v in data.items()}
    with pytest.raises(ConfigError) as caught:
        with_current_names(both)
    assert f"`{old}` and `{new}` are the same setting" in caught.value.message
    assert caught.value.remedy == f"Remove `{old}`, the old name."


@pytest.mark.parametrize(("name", "old_value"), RENAMED_VALUES)
def test_old_value_loads_with_one_warning(name: str, old_value: str, caplog: pytest.LogCaptureFixture) -> None:
    new_value = RENAMED_VALUES[name, old_value]
    assert value_of(read(nested(name, old_value)), name) == new_value
    assert f'"{new_value}"' in caplog.text
    assert len(caplog.records) == 1


def test_warning_about_a_file_names_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text("[gate]\nmax_norm = 5.0\n")
    assert load_config(path, FleetConfig).validation.max_norm == 5.0
    assert caplog.messages[0].startswith(f"{path}: `gate`")
    path.write_text("[gate]\nmax_norm = 5.0\n[validation]\nmax_norm = 6.0\n")
    with pytest.raises(ConfigError, match=rf"{path}: `gate` and `validation`"):
        load_config(path, FleetConfig)


def test_run_folder_with_old_setting_names_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = FleetConfig(run_dir=str(tmp_path / "run"))
    stored = msgspec.to_builtins(config)
    for old, new in RENAMED_SETTINGS.items():
        section, _, key = old.rpartition(".")
        table = stored.get(section, {}) if section else stored
        if new.rpartition(".")[2] in table:
            table[key] = table.pop(new.rpartition(".")[2])
    assert "gate" in stored
    run = RunDir(config)
    run.journal.set_meta(run_id="r", config=json.dumps(stored))
    run.close()
    RunDir(config).close()
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"validation\.max_norm"):
        RunDir(convert({"run_dir": config.run_dir, "validation": {"max_norm": 7.0}}, FleetConfig))
