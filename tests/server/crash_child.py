"""Run by test_server_crash.py: a fleet in virtual time whose process kills itself for real.

Usage: crash_child.py FOLDER POINT COUNT, where POINT is a method of `Journal` or `ServerPublisher`, and COUNT the call
before or after which the process dies ("before:put_report", "after:put_report"); "never" runs to the end and prints the
result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fleet_fakes import Fleet, make_config

from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.publisher import ServerPublisher


def arm(point: str, count: int) -> None:
    when, _, name = point.partition(":")
    owner = Journal if hasattr(Journal, name) else ServerPublisher
    original, calls = getattr(owner, name), iter(range(1, 10_000))

    def wrapped(self, *args, **options):
        last = next(calls) == count
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, *args, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def main() -> None:
    folder, point, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    (folder / "devices").mkdir(parents=True, exist_ok=True)
    if point != "never":
        arm(point, count)
    fleet = Fleet(folder / "devices")
    fleet.add_three()
    print(json.dumps(fleet.serve(make_config(folder / "run")).to_dict()))


if __name__ == "__main__":
    main()
