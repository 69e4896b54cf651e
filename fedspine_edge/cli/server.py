"""`fedspine-edge server`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

EXAMPLE = "fedspine-edge server --config examples/fleet.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="fleet settings (TOML)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import FleetConfig, load_config
    from fedspine_edge.server.server import FleetServer
    from fedspine_edge.transport.mqtt import MqttTransport

    config = load_config(arguments.config, FleetConfig)
    transport = MqttTransport(config.broker, client_id=f"fedspine-{config.fleet}-server")
    logger.info("to watch it: fedspine-edge status %s --follow", config.run_dir)
    result = FleetServer(config, transport).run()
    if arguments.json:
        print_json(result.to_dict())
    else:
        print(f"finished after {result.num_rounds} rounds: {result.final_dir}")
        print(f"next: fedspine-edge export {config.run_dir} --model BASE --out model/")
    return 0
