"""Command `fedspine-edge simulate`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.options import TASKS, accept_old_name, add_json_option

if TYPE_CHECKING:
    from fedspine_edge.config import Task

EXAMPLE = """fedspine-edge simulate --config fleet/fleet.toml fleet/devices/*.toml
  fedspine-edge simulate --num-devices 8 --mix tx2=30,nx=40,agx=10 --out runs/sim
  fedspine-edge simulate --mix nx=2 --task causal_lm --model llm/ --data chats.jsonl --text prompt --text-pair answer
  fedspine-edge simulate --num-devices 10000 --mix tx2=3,nx=4,agx=1 --recorded --num-rounds 5 --out runs/many"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=None, help="settings of the fleet (TOML); the broker is unused")
    parser.add_argument("devices", type=Path, nargs="*", help="settings of the devices (TOML), one file per device")
    mix = parser.add_argument_group("a fleet of device classes, instead of device files")
    mix.add_argument("--mix", default=None, help="device classes and their shares, such as tx2=30,nx=40,agx=10")
    mix.add_argument("--num-devices", type=int, default=None, help="number of devices (default: the sum of --mix)")
    mix.add_argument("--out", type=Path, default=Path("runs/simulated"), help="folder of the run")
    classes = mix.add_argument(
        "--device-classes", metavar="FILE", type=Path, default=None, help="device classes (default: the built-in ones)"
    )
    accept_old_name(parser, "--profiles", classes)
    mix.add_argument("--model", type=Path, default=None, help="base model folder (default: all-MiniLM-L6-v2)")
    mix.add_argument(
        "--task",
        choices=TASKS,
        default=None,
        help="task to train for (default: classification); the other tasks need --model and --data",
    )
    mix.add_argument(
        "--data",
        type=Path,
        default=None,
        help="CSV file with text and label (default: sentences of four domains)",
    )
    mix.add_argument("--text", metavar="COLUMN", default="text", help="column of the texts, word lists or prompts")
    mix.add_argument(
        "--text-pair", metavar="COLUMN", default="", help="column of the second texts, or of the answers to the prompts"
    )
    mix.add_argument("--num-labels", type=int, default=2, help="number of classes in --data")
    mix.add_argument(
        "--dirichlet",
        type=float,
        default=None,
        metavar="ALPHA",
        help="partition by label from Dirichlet(ALPHA), not by domain",
    )
    disconnects = mix.add_argument(
        "--disconnect-probability", type=float, default=None, help="probability of a disconnect during a round"
    )
    accept_old_name(parser, "--drop-out", disconnects)
    mix.add_argument(
        "--recorded", action="store_true", help="replay recorded losses instead of training, for thousands of devices"
    )
    shape = mix.add_argument(
        "--model-shape",
        choices=["small", "minilm"],
        default="small",
        help="with --recorded: shape of the model",
    )
    accept_old_name(parser, "--wire", shape)
    rounds = mix.add_argument(
        "--num-rounds", type=int, default=None, help="server rounds; at least 5 with the default pruning ratio"
    )
    accept_old_name(parser, "--rounds", rounds)
    mix.add_argument("--pruning-ratio", type=float, default=None, help="share of the prunable parameters to remove")
    mix.add_argument("--strategy", default=None, help="strategy, see docs/concepts/strategies.md (default: fedspine)")
    mix.add_argument("--seed", type=int, default=None, help="random seed (default: 0)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import DeviceConfig, FleetConfig, load_config, setting_names
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.simulation.virtual_fleet import simulate

    if arguments.mix:
        if arguments.devices:
            raise ConfigError("device files and --mix cannot be combined.", remedy="Give one of them.")
        return _run_mix(arguments)
    if arguments.config is None or not arguments.devices:
        raise ConfigError("no fleet to simulate.", remedy="Give --config and device files, or --mix.")
    arguments.names = setting_names(FleetConfig) | setting_names(DeviceConfig)
    fleet = load_config(arguments.config, FleetConfig)
    result = simulate(fleet, [load_config(path, DeviceConfig) for path in arguments.devices])
    if arguments.json:
        print_json(result.to_dict())
    else:
        print(f"finished after {result.num_rounds} rounds, simulated time: {result.final_dir}")
        print(f"adapter sha256 {result.adapter_sha256}")
    return 0


def _run_mix(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedspine_edge.cli.main import print_json
    from fedspine_edge.config import DeviceConfig, FleetConfig, load_config
    from fedspine_edge.simulation import device_classes as classes
    from fedspine_edge.simulation.cost_model import find_spec
    from fedspine_edge.simulation.experiments.run_metrics import measure
    from fedspine_edge.simulation.fleet_settings import DeviceInputs, default_model, simulated_fleet
    from fedspine_edge.simulation.replay import BUILT_IN, LossRecord, ReplayContext
    from fedspine_edge.simulation.run_identity import FILE as NOTED
    from fedspine_edge.simulation.run_identity import require_same_inputs
    from fedspine_edge.simulation.virtual_fleet import simulate, simulate_recorded

    known = classes.load_device_classes(arguments.device_classes or classes.BUILT_IN)
    mix = classes.parse_mix(arguments.mix, known)
    if arguments.num_devices is not None:
        mix = classes.scale_mix(mix, arguments.num_devices)
    settings = {
        "num_rounds": arguments.num_rounds,
        "pruning_ratio": arguments.pruning_ratio,
        "strategy": arguments.strategy,
        "task": arguments.task,
        "seed": arguments.seed,
    }
    fleet_settings = {name: value for name, value in settings.items() if value is not None}
    if arguments.config is not None:
        base = msgspec.to_builtins(load_config(arguments.config, FleetConfig))
        fleet_settings = {**{k: v for k, v in base.items() if k not in ("run_dir", "min_devices")}, **fleet_settings}
    out = arguments.out.resolve()
    if arguments.recorded:
        spec = find_spec(arguments.model_shape)
        context = ReplayContext(LossRecord.load(BUILT_IN), spec=spec)
        inputs = DeviceInputs(
            model="none",
            shares=[Path("none.csv")],
            num_labels=arguments.num_labels,
            disconnect_probability=arguments.disconnect_probability,
        )
        fleet, devices = simulated_fleet(out, mix, known, inputs, **fleet_settings)
        result = simulate_recorded(fleet, devices, context)
    else:
        model = str((arguments.model or default_model()).resolve())

        def set_up(data: Path) -> tuple[FleetConfig, tuple[DeviceConfig, ...]]:
            shares, columns = _shares(arguments, data, sum(mix.values()), fleet_settings.get("task"))
            holdout = min(64, _smallest(shares) // 2)
            inputs = DeviceInputs(
                model=model,
                shares=shares,
                num_labels=arguments.num_labels,
                holdout=holdout,
                columns=columns,
                disconnect_probability=arguments.disconnect_probability,
            )
            return simulated_fleet(out, mix, known, inputs, **fleet_settings)

        if (out / "run" / NOTED).is_file():  # fail before the data of the existing run is overwritten
            with tempfile.TemporaryDirectory() as folder:
                require_same_inputs(out / "run", set_up(Path(folder))[1])
        fleet, devices = set_up(out / "data")
        result = simulate(fleet, devices)
    figures = measure(Path(fleet.run_dir))
    if arguments.json:
        print_json({**result.to_dict(), "measures": figures, "training": "recorded" if arguments.recorded else "real"})
        return 0
    print(f"finished after {result.num_rounds} rounds: {result.final_dir}")
    if arguments.recorded:
        print("training was replaced by recorded losses; losses and accuracies do not describe a model")
    print(f"simulated time {figures['total_time_s']:.0f} s, idle share {100 * figures['idle_share']:.1f} %")
    return 0


def _shares(
    arguments: argparse.Namespace, folder: Path, num_devices: int, task: Task | None
) -> tuple[list[Path], dict[str, str]]:
    """Return the data file of each device and the names of its columns."""
    from fedspine_edge.config import DataSettings
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.simulation.data_shares import partition_data, prepare_data

    named = (arguments.text, arguments.text_pair) != ("text", "")
    if task in (None, "classification") and not named:
        shares, _ = prepare_data(
            folder,
            num_devices=num_devices,
            data=arguments.data,
            num_labels=arguments.num_labels,
            dirichlet=arguments.dirichlet,
            seed=arguments.seed or 0,
        )
        return shares, {}
    if arguments.model is None or arguments.data is None or arguments.dirichlet is not None:
        raise ConfigError(
            "other tasks and columns need a model and data, and cannot be partitioned by label.",
            remedy="Give --model and --data, and omit --dirichlet.",
        )
    columns = {"text": arguments.text, "text_pair": arguments.text_pair}
    data = DataSettings(path=str(arguments.data), num_labels=arguments.num_labels, **columns)
    return partition_data(folder, data=data, task=task or "classification", num_devices=num_devices), columns


def _smallest(shares: list[Path]) -> int:
    """Return the number of rows of the smallest file."""
    return min(path.read_text(encoding="utf-8").count("\n") - 1 for path in shares)
