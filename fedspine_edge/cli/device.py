"""Command `fedspine-edge device`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge device --config examples/device.toml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="settings of the device (TOML)")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.config import DeviceConfig, FleetConfig, load_config, setting_names
    from fedspine_edge.device.agent import FleetDevice
    from fedspine_edge.protocol.topics import client_id
    from fedspine_edge.transport.mqtt import MqttTransport

    arguments.names = setting_names(FleetConfig) | setting_names(DeviceConfig)
    config = load_config(arguments.config, DeviceConfig)
    transport = MqttTransport(
        config.broker,
        client_id=client_id(config.fleet, "device", config.device_id),
        reconnect_timeout_s=config.reconnect_timeout_s,
    )
    return FleetDevice(config, transport).run()
