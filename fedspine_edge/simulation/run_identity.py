"""Check that a simulated run is continued with the devices and the data that it began with.

The server stores its own settings, but not those of the devices or their data. A simulation creates the devices again
for every command, so without this check a run could be continued with other `--data` or another `--dirichlet`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedspine_edge.config import DeviceConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.files import write_text_atomically
from fedspine_edge.server.journal.reader import FILE as JOURNAL

FILE = "simulated.json"


def require_same_inputs(run_dir: Path, devices: Sequence[DeviceConfig]) -> None:
    """Record the devices of a new run in its folder, or compare the devices with those on record.

    Files are compared by content, not by location. Raises `ConfigError` naming the first device that differs.
    """
    now = {device.device_id: _digests(device) for device in devices}
    path = run_dir / FILE
    started = (run_dir / JOURNAL).exists()
    if not started or not path.is_file():  # without a journal no device started, so the record may be replaced
        if not started and run_dir.is_dir() and any(not one.name.startswith(FILE) for one in run_dir.iterdir()):
            return  # not a run folder; the server reports that
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(now, indent=0, sort_keys=True) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        if name not in now or name not in before:
            difference = f"device {name!r} is {'new' if name in now else 'missing'}"
        else:
            parts = [part for part in now[name] if now[name][part] != before[name].get(part)]
            difference = f"{' and '.join(parts)} of device {name!r} {'differ' if len(parts) > 1 else 'differs'}"
        raise ConfigError(
            f"{run_dir} holds a simulated run with other devices or data: {difference}"
            f"{f' (one of {len(changed)} devices)' if len(changed) > 1 else ''}.",
            remedy="Use the options that the run began with to continue it, or another folder for a new run.",
        )


def _digests(device: DeviceConfig) -> dict[str, str]:
    settings = msgspec.to_builtins(device)
    for name in ("model", "state_dir", "broker"):  # the server records the model's digest
        del settings[name]
    data = Path(settings["data"].pop("path"))
    content = data.read_bytes() if data.is_file() else b""  # none for 'module:function' and for recorded losses
    digests = {"data": content, "configuration": json.dumps(settings, sort_keys=True).encode()}
    return {part: hashlib.sha256(value).hexdigest()[:16] for part, value in digests.items()}
