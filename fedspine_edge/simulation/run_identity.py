"""A simulated run goes on with the devices and the data that it began with, or not at all.

The server remembers its own settings; what its devices are and hold it cannot know. In a simulation they are set up
anew by every command, and another `--data` or `--dirichlet` would otherwise be taken for the run that is there.
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
    """Note the devices of a run in its folder, or compare them with those noted.

    Where a file lies does not matter, what is in it does. Raises `ConfigError` naming the first device that differs.
    """
    now = {device.device_id: _digests(device) for device in devices}
    path = run_dir / FILE
    begun = (run_dir / JOURNAL).exists()
    if not begun or not path.is_file():  # noted by a run whose devices could not even start: correct and try again
        if not begun and run_dir.is_dir() and any(not one.name.startswith(FILE) for one in run_dir.iterdir()):
            return  # no run: the server will say so
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(now, indent=0, sort_keys=True) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        if name not in now or name not in before:
            what = f"device {name!r} is {'new' if name in now else 'missing'}"
        else:
            parts = [part for part in now[name] if now[name][part] != before[name].get(part)]
            what = f"{' and '.join(parts)} of device {name!r} {'differ' if len(parts) > 1 else 'differs'}"
        raise ConfigError(
            f"{run_dir} holds a simulated run of other devices or data: {what}"
            f"{f' (one of {len(changed)} devices)' if len(changed) > 1 else ''}.",
            remedy="Give the options it was begun with to continue it, or another folder for a new run.",
        )


def _digests(device: DeviceConfig) -> dict[str, str]:
    settings = msgspec.to_builtins(device)
    for name in ("model", "state_dir", "broker"):  # the server pins the model's digest
        del settings[name]
    data = Path(settings["data"].pop("path"))
    content = data.read_bytes() if data.is_file() else b""  # 'module:function', or nothing where losses are recorded
    digests = {"data": content, "configuration": json.dumps(settings, sort_keys=True).encode()}
    return {part: hashlib.sha256(value).hexdigest()[:16] for part, value in digests.items()}
