"""`fedspine-edge simulate`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge simulate --config fleet/fleet.toml fleet/devices/*.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="fleet settings (TOML); the broker is not used")
    parser.add_argument("devices", type=Path, nargs="+", help="device settings (TOML), one file a device")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import DeviceConfig, FleetConfig, load
    from fedspine_edge.simulation.fleet import simulate

    fleet = load(arguments.config, FleetConfig)
    result = simulate(fleet, [load(path, DeviceConfig) for path in arguments.devices])
    if arguments.json:
        print_json(result.to_dict())
    else:
        print(f"finished after {result.num_rounds} rounds, simulated time: {result.final_dir}")
        print(f"adapter sha256 {result.adapter_sha256}")
    return 0
