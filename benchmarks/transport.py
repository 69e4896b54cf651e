"""Throughput of the MQTT transport in 96 KiB chunks: uploads of six devices at once, and downloads in windows of 16.

    python benchmarks/transport.py             # the embedded broker
    python benchmarks/transport.py HOST PORT   # a broker that is already there

Prints one JSON object. Everything runs on this machine and shares its cores, the broker included.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from fedspine_edge.config import BrokerSettings
from fedspine_edge.transport.base import Incoming
from fedspine_edge.transport.broker import EmbeddedBroker
from fedspine_edge.transport.mqtt import MqttTransport

CHUNK = bytes(range(256)) * 384
DEVICES, CHUNKS_EACH, WINDOW = 6, 100, 16


def _drain(transport: MqttTransport, count: int) -> None:
    while count:
        event = transport.receive(timeout_s=60)
        if event is None:
            raise SystemExit(f"{count} messages did not arrive within 60 s")
        count -= isinstance(event, Incoming)


def _together(work: list[threading.Thread]) -> None:
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()


def measure(settings: BrokerSettings) -> dict[str, float]:
    """Seconds and MB/s (10^6 bytes) of both directions, and of a round trip in ms."""
    server = MqttTransport(settings, "bench-server")
    devices = [MqttTransport(settings, f"bench-{number}") for number in range(DEVICES)]
    for transport in (server, *devices):
        transport.connect(timeout_s=10)
    server.subscribe("bench/up/#")

    def upload(device: MqttTransport) -> None:
        for index in range(CHUNKS_EACH):
            device.publish(f"bench/up/{device.client_id}/{index}", CHUNK)

    def download(device: MqttTransport) -> None:
        for start in range(0, CHUNKS_EACH, WINDOW):
            topics = [f"bench/down/{index}" for index in range(start, min(start + WINDOW, CHUNKS_EACH))]
            device.subscribe(*topics)
            _drain(device, len(topics))
            device.unsubscribe(*topics)

    uploads = [threading.Thread(target=upload, args=(device,)) for device in devices]
    started = time.perf_counter()
    for thread in uploads:
        thread.start()
    _drain(server, DEVICES * CHUNKS_EACH)
    up_s = time.perf_counter() - started

    started = time.perf_counter()
    for index in range(CHUNKS_EACH):
        server.publish(f"bench/down/{index}", CHUNK, retain=True)
    _together([threading.Thread(target=download, args=(device,)) for device in devices])
    down_s = time.perf_counter() - started
    for index in range(CHUNKS_EACH):
        server.publish(f"bench/down/{index}", b"", retain=True)

    server.subscribe("bench/ping")
    trips = []
    for _ in range(200):
        started = time.perf_counter()
        server.publish("bench/ping", b"")
        _drain(server, 1)
        trips.append(time.perf_counter() - started)
    for transport in (server, *devices):
        transport.close()
    megabytes = DEVICES * CHUNKS_EACH * len(CHUNK) / 1e6
    return {
        "megabytes_each_way": round(megabytes, 1),
        "up_s": round(up_s, 2),
        "up_mb_s": round(megabytes / up_s, 1),
        "down_s": round(down_s, 2),
        "down_mb_s": round(megabytes / down_s, 1),
        "round_trip_ms_median": round(sorted(trips)[len(trips) // 2] * 1e3, 2),
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(BrokerSettings(host=sys.argv[1], port=int(sys.argv[2])))))
        return
    with EmbeddedBroker() as broker:
        result = measure(BrokerSettings(port=broker.port))
        status = Path(f"/proc/{broker.pid}/status").read_text()
        result["broker_peak_mb"] = round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
