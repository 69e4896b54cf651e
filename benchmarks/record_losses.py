#!/usr/bin/env python3
"""Trains small real fleets and writes the record of losses that `simulate --recorded` draws from.

    benchmarks/record_losses.py                # about 6 CPU minutes; writes recorded_losses.json of the simulation
    benchmarks/record_losses.py --out x.json --rounds 12

The sentences are those of the training part; held-out examples are the devices' own, so the test part is not touched.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedspine_edge.simulation import replay
from fedspine_edge.simulation.data_shares import prepare_data
from fedspine_edge.simulation.device_classes import load_device_classes
from fedspine_edge.simulation.fleet_settings import DeviceInputs, default_model, simulated_fleet
from fedspine_edge.simulation.virtual_fleet import simulate

RUNS = ({"strategy": "fedspine", "pruning_ratio": 0.75}, {"strategy": "fedlora", "pruning_ratio": 0.0})
TRAINING = {"tau": 8, "recovery_steps": 8, "learning_rate": 1e-3, "batch_size": 8, "max_length_tokens": 48}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=replay.BUILT_IN)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--devices", type=int, default=4)
    arguments = parser.parse_args()
    folders = []
    with tempfile.TemporaryDirectory() as temp:
        for seed, settings in enumerate(RUNS):
            folder = Path(temp) / f"run-{seed}"
            shares, _ = prepare_data(folder / "data", num_devices=arguments.devices)
            fleet, devices = simulated_fleet(
                folder,
                {"paper-agx": arguments.devices},
                load_device_classes(),
                DeviceInputs(model=str(default_model()), shares=shares, holdout=48),
                num_rounds=arguments.rounds,
                seed=seed,
                training=TRAINING,
                **settings,
            )
            simulate(fleet, devices)
            folders.append(Path(fleet.run_dir))
            print(f"run {seed} done", file=sys.stderr, flush=True)
        source = (
            f"all-MiniLM-L6-v2 on four-domain sentiment, {arguments.devices} devices by domain, {arguments.rounds} "
            f"rounds of {TRAINING['tau']} + {TRAINING['recovery_steps']} steps; FedSpine to 0.75, and FedLoRA unpruned"
        )
        record = replay.LossRecord.of_runs(folders, source)
    record.save(arguments.out)
    print(f"{len(record.points)} device-rounds: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
