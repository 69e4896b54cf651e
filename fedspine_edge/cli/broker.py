"""Command `fedspine-edge broker`."""

from __future__ import annotations

import argparse

EXAMPLE = "fedspine-edge broker --port 1883"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="IP address to listen on")
    parser.add_argument("--port", type=int, default=1883, help="TCP port to listen on")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.transport.broker import run_broker

    run_broker(arguments.host, arguments.port)
    return 0
