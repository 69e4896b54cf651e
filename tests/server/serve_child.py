"""Run by test_server_mqtt.py: a real server on a real broker. Usage: serve_child.py RUN_DIR PORT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fleet_fakes import make_config

from fedspine_edge.server.server import FleetServer
from fedspine_edge.transport.mqtt import MqttTransport

if __name__ == "__main__":
    config = make_config(Path(sys.argv[1]), broker={"port": int(sys.argv[2])}, deadline_s=40.0)
    print(json.dumps(FleetServer(config, MqttTransport(config.broker, "server")).run().to_dict()))
