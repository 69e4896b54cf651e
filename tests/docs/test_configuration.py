"""Checks docs/reference and examples/*.toml against the settings, the argument parser and the tables' columns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedspine_edge.config import DeviceConfig, FleetConfig, load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FILES = {"fleet.toml": FleetConfig, "device.toml": DeviceConfig}


def keys(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Dotted names of every key, sections opened."""
    for field in msgspec.inspect.type_info(struct).fields:  # type: ignore[attr-defined]
        if isinstance(field.type, msgspec.inspect.StructType):
            yield from keys(field.type.cls, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_generated_reference_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "write_reference_docs"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configuration_page_describes_every_setting() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    for kind in FILES.values():
        for key in keys(kind):
            rows = [line for line in page.splitlines() if line.startswith(f"| `{key.rpartition('.')[2]}` |")]
            assert rows, key
            assert all(len(row.replace("\\|", "").split("|")[4].strip()) > 10 for row in rows), key


@pytest.mark.parametrize("name", FILES)
def test_example_settings_load_and_explain_every_key(name: str) -> None:
    path = ROOT / "examples" / name
    load_config(path, FILES[name])
    text = path.read_text(encoding="utf-8")
    assert set(flat(tomllib.loads(text))) == set(keys(FILES[name]))
    bare = [line for line in text.splitlines() if "=" in line.partition("#")[0] and "#" not in line]
    plain = {"learning_rate", "batch_size", "max_grad_norm", "weight_decay", "weight_by_importance", "num_labels"}
    assert {line.split()[0] for line in bare} <= plain | {"host", "key_file"}


def test_example_settings_state_the_defaults() -> None:
    assert load_config(ROOT / "examples" / "fleet.toml", FleetConfig) == FleetConfig()
    device = load_config(ROOT / "examples" / "device.toml", DeviceConfig)
    required = {"device_id": device.device_id, "model": device.model, "data": {"path": device.data.path}}
    assert device == msgspec.convert(required, DeviceConfig)
