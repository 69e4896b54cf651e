"""Command `fedspine-edge server`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fedspine_edge.cli.options import add_json_option

logger = logging.getLogger(__name__)

EXAMPLE = "fedspine-edge server --config examples/fleet.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="settings of the fleet (TOML)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import FleetConfig, load_config
    from fedspine_edge.protocol.topics import client_id
    from fedspine_edge.server.server import FleetServer
    from fedspine_edge.transport.mqtt import MqttTransport

    config = load_config(arguments.config, FleetConfig)
    transport = MqttTransport(config.broker, client_id=client_id(config.fleet, "server"))
    logger.info("watch the run with: fedspine-edge status %s --follow", config.run_dir)
    result = FleetServer(config, transport).run()
    if arguments.json:
        print_json(result.to_dict())
    else:
        print(f"finished after {result.num_rounds} rounds: {result.final_dir}")
        print(f"next: fedspine-edge assemble {config.run_dir} --model BASE --out model/")
    return 0
