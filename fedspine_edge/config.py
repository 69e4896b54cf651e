"""Settings of a fleet and of a device: msgspec structs that are read from TOML files.

Names contain their units. docs/reference/configuration.md is generated from the description of each field. Unknown
keys, wrong types and out-of-range values raise a `ConfigError` that names the key. Settings are immutable.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, field

from fedspine_edge.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T", bound=msgspec.Struct)
log = logging.getLogger(__name__)

Task = Literal["classification", "token_classification", "causal_lm"]


def _doc(text: str, **limits: Any) -> Meta:
    return Meta(description=text, **limits)


Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of all sections."""


class BrokerSettings(_Section, frozen=True, kw_only=True):
    """Connection to the MQTT 5 broker."""

    host: Annotated[str, _doc("Host name or address of the broker.")] = "127.0.0.1"
    port: Annotated[int, _doc("TCP port. TLS usually uses 8883.", ge=1, le=65535)] = 1883
    username: Annotated[str, _doc("User name. Empty: anonymous.")] = ""
    password_file: Annotated[str, _doc("File whose first line is the password. Empty: no password.")] = ""
    ca_file: Annotated[str, _doc("PEM file of the authority that signed the broker's certificate. Enables TLS.")] = ""
    cert_file: Annotated[str, _doc("PEM file of this client's certificate (mutual TLS).")] = ""
    key_file: Annotated[str, _doc("PEM file of this client's private key.")] = ""
    keepalive_s: Annotated[
        int,
        _doc(
            "MQTT keep-alive in seconds. The broker publishes the last will after 1.5 × this time without traffic.",
            ge=5,
        ),
    ] = 30


class BanditSettings(_Section, frozen=True, kw_only=True):
    """Settings of S-UCB. See docs/concepts/s-ucb.md."""

    discount: Annotated[
        float, _doc("Discount λ: weight of a reward relative to that of the next round.", gt=0, lt=1)
    ] = 0.95
    exploration: Annotated[float, _doc("Exploration s: width of the confidence bound.", ge=0)] = 0.2
    min_leaf_width: Annotated[
        float, _doc("Width δ: a leaf is split only while its longest normalized side exceeds this.", gt=0)
    ] = 0.25
    max_step: Annotated[float, _doc("Largest increase of a device's pruning ratio in one round.", gt=0, le=1)] = 0.25
    arm_choice: Annotated[
        Literal["paced", "uniform"],
        _doc(
            "Arms to draw from. `paced`: arms whose predicted time matches the time that the slowest device needs; "
            "`uniform`: all arms."
        ),
    ] = "paced"
    time_tolerance: Annotated[
        float,
        _doc(
            "Largest amount by which the predicted time of a paced arm may be shorter, as a difference of logarithms: "
            "0.05 is 4.9 %.",
            gt=0,
            lt=1,
        ),
    ] = 0.05
    prior: Annotated[
        Literal["none", "class"],
        _doc("Start of a new device. `class`: the tree of its device class; `none`: an empty tree."),
    ] = "class"


class RewardSettings(_Section, frozen=True, kw_only=True):
    """Weights of the reward terms, which must sum to 1. See docs/concepts/s-ucb.md, "Reward"."""

    loss: Annotated[float, _doc("Weight of the relative decrease of the held-out loss.", ge=0, le=1)] = 0.3
    time: Annotated[
        float,
        _doc(
            "Weight of the time term, which is 1 for a device that takes exactly the target time of the round.",
            ge=0,
            le=1,
        ),
    ] = 0.5
    lora: Annotated[float, _doc("Weight of the importance I(B_total) of the adapter.", ge=0, le=1)] = 0.2
    prune: Annotated[float, _doc("Weight of the progress toward the pruning target.", ge=0, le=1)] = 0.0
    mode: Annotated[
        Literal["sum", "product"], _doc("`sum`: weighted sum of the terms; `product`: the form of the paper, bounded.")
    ] = "sum"

    def __post_init__(self) -> None:
        total = self.loss + self.time + self.lora + self.prune
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"reward weights sum to {total:g}; they must sum to 1")


class AggregationSettings(_Section, frozen=True, kw_only=True):
    """Aggregation of the adapters. See docs/concepts/aggregation.md."""

    rule: Annotated[
        Literal["reconstruct", "zero_pad", "stack", "svd", "trimmed_mean", "median"],
        _doc(
            "`reconstruct`: exact average of B·A for mixed ranks and layouts. `zero_pad`, `stack` and `svd` are "
            "baselines; `trimmed_mean` and `median` are robust against outliers."
        ),
    ] = "reconstruct"
    weight_by_importance: Annotated[bool, _doc("Multiply the weight num_examples of a device by its I(B_total).")] = (
        False
    )
    complete_ranks: Annotated[
        bool,
        _doc("Add the components that a device did not receive to its low-rank update, so that averaging keeps them."),
    ] = True
    clip_norm: Annotated[
        float,
        _doc(
            "Scale the adapter of an update down to at most this multiple of the devices' median norm. The norms of "
            "honest devices with different ranks differ by up to a factor of about 7. 0: off.",
            ge=0,
        ),
    ] = 10.0
    clip_head: Annotated[
        float,
        _doc(
            "Limit the distance of a task head from the one that was sent to this multiple of the devices' median "
            "distance. 0: off.",
            ge=0,
        ),
    ] = 3.0
    max_examples_ratio: Annotated[
        float,
        _doc(
            "Count the num_examples of a device up to this multiple of the devices' median, since devices report it "
            "themselves. 0: no limit.",
            ge=0,
        ),
    ] = 2.0


class ValidationSettings(_Section, frozen=True, kw_only=True):
    """Validation of updates."""

    max_norm: Annotated[
        float,
        _doc("Largest L2 norm of B·A in a module and of a tensor of the head. An update above it is rejected.", gt=0),
    ] = 1e3
    keep_rejected: Annotated[int, _doc("Number of rejected updates kept in run_dir/rejected for inspection.", ge=0)] = (
        50
    )


class TrainingSettings(_Section, frozen=True, kw_only=True):
    """Local training, the same on every device."""

    tau: Annotated[
        int, _doc("Training steps before pruning, all of which contribute to the scores (τ in the paper).", ge=1)
    ] = 20
    recovery_steps: Annotated[int, _doc("Training steps after pruning.", ge=0)] = 20
    learning_rate: Annotated[float, _doc("Peak learning rate of AdamW.", gt=0)] = 1e-3
    batch_size: Annotated[int, _doc("Examples per step.", ge=1)] = 8
    max_length_tokens: Annotated[int, _doc("Longest text in tokens. Longer texts are truncated.", ge=4)] = 128
    schedule: Annotated[
        Literal["constant_then_cosine", "cosine"],
        _doc(
            "Learning rate. `constant_then_cosine`: constant until pruning is complete, then cosine decay; "
            "`cosine`: cosine decay over the whole run."
        ),
    ] = "constant_then_cosine"
    warmup_ratio: Annotated[float, _doc("Share of a round's steps with linear warmup.", ge=0, le=1)] = 0.1
    max_grad_norm: Annotated[float, _doc("Gradients are clipped to this global norm.", gt=0)] = 1.0
    weight_decay: Annotated[float, _doc("Weight decay of AdamW on the adapters and the head.", ge=0)] = 0.0
    lora_scaling: Annotated[float, _doc("LoRA scaling lora_alpha / r, the same for every rank.", gt=0)] = 2.0


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the optimizer that a plan carries, the same for every device of the fleet."""

    learning_rate: Annotated[float, Meta(gt=0.0, le=1e6)] = 1e-3
    batch_size: Annotated[int, Meta(ge=1, le=10**9)] = 8
    max_length_tokens: Annotated[int, Meta(ge=1, le=10**9)] = 48
    warmup_ratio: Annotated[float, Meta(ge=0.0, le=1.0)] = field(default=0.1, name="warmup_share")
    """Share of a round's steps with linear warmup, since AdamW's moments start at zero in every round."""
    max_grad_norm: Annotated[float, Meta(gt=0.0, le=1e30)] = 1.0
    weight_decay: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    first_step: Annotated[int, Meta(ge=0, le=10**18)] = 0
    """Number of steps before this round."""
    total_steps: Annotated[int, Meta(ge=1, le=10**18)] = 1
    """Number of steps of the whole run. The learning rate reaches zero at its end."""
    decay_from_step: Annotated[int, Meta(ge=0, le=10**18)] = 0
    """Step of the run at which cosine decay begins. Before it, the learning rate is at its peak."""


class FleetConfig(_Section, frozen=True, kw_only=True):
    """Settings of `fedspine-edge server`."""

    fleet: Annotated[Name, _doc("Name of the fleet, part of every topic.")] = "fleet"
    run_dir: Annotated[str, _doc("Folder for the journal, the blobs and the final adapter.")] = "runs/fleet"
    task: Annotated[Task, _doc("Task of the fleet. A device with another task is rejected.")] = "classification"
    num_rounds: Annotated[
        int,
        _doc(
            "Number of server rounds. The last two only fine-tune; with layout `consensus` the first one only scores. "
            "Strategies that prune gradually need pruning_ratio / bandit.max_step rounds in between: at the defaults, "
            "5 rounds in total.",
            ge=3,
        ),
    ] = 10
    pruning_ratio: Annotated[
        float, _doc("Share of the prunable parameters to remove by the end (P in the paper).", ge=0, lt=1)
    ] = 0.5
    target: Annotated[
        Literal["equal", "fleet_mean"],
        _doc(
            "`equal`: every device ends at pruning_ratio; `fleet_mean`: devices differ by up to ±0.15 and the mean is "
            "pruning_ratio."
        ),
    ] = "equal"
    ranks: Annotated[tuple[int, ...], _doc("LoRA ranks to choose from, ascending, each within 1..256.")] = (
        4,
        8,
        16,
        32,
    )
    strategy: Annotated[
        str,
        _doc(
            "Strategy that chooses ratios and ranks: fedspine, fixed, fedlora, hetlora, fedapt, prune_then_tune, "
            "tune_then_prune, or the 'module:attribute' of your own."
        ),
    ] = "fedspine"
    layout: Annotated[
        Literal["consensus", "local"],
        _doc("`consensus`: all devices prune in one common order; `local`: each device ranks its own groups."),
    ] = "consensus"
    criterion: Annotated[
        Literal["lora", "apt", "magnitude", "random"], _doc("Criterion that ranks heads and channels.")
    ] = "lora"
    importance_metric: Annotated[
        Literal["auto", "abs", "square", "signed", "group"],
        _doc(
            "How criterion `lora` sums the terms of a group. `abs`: absolute values, as in LoRAPrune; `group`: "
            "absolute value of the sum; `auto`: `group` for language models, otherwise `abs`."
        ),
    ] = "auto"
    scope: Annotated[
        Literal["layer", "global"],
        _doc("`layer`: all layers have equal widths; `global`: layers compete. `global` needs layout `local`."),
    ] = "layer"
    round_to: Annotated[int, _doc("The number of channels kept in a layer is a multiple of this.", ge=1)] = 8
    download_dtype: Annotated[
        Literal["float32", "float16"], _doc("Precision of the adapter and head sent to the devices.")
    ] = "float16"
    min_devices: Annotated[int, _doc("Number of devices that must be online before round 1 starts.", ge=1)] = 1
    join_timeout_s: Annotated[float, _doc("Time to wait for min_devices, in seconds.", gt=0)] = 600.0
    deadline_s: Annotated[
        float, _doc("Longest duration of a round, in seconds. Other timeouts derive from it.", gt=0)
    ] = 600.0
    min_reports: Annotated[
        int, _doc("Smallest number of reports to aggregate. A round with fewer reports is repeated.", ge=1)
    ] = 1
    max_failed_rounds: Annotated[int, _doc("Number of consecutive failed rounds after which the run stops.", ge=1)] = 3
    base_sha256: Annotated[
        str, _doc("Required SHA-256 of the base model. Empty: that of most devices at the first round.")
    ] = ""
    seed: Annotated[int, _doc("Seed for the adapters, the bandit and the data order.", ge=0)] = 0
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    bandit: BanditSettings = field(default_factory=BanditSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        if not self.ranks or any(not 1 <= r <= 256 for r in self.ranks) or sorted(set(self.ranks)) != list(self.ranks):
            raise ValueError(f"ranks is {list(self.ranks)}; it must be ascending, unique and each within 1..256")
        if self.scope == "global" and self.layout == "consensus":
            raise ValueError('scope "global" needs layout "local": a common order gives every layer the same width')


def required_devices(min_reports: int, min_devices: int, *, first_attempt: bool) -> int:
    """Return how many devices must be online before a round begins.

    Every round needs `min_reports` devices. The first attempt at the first round also waits for `min_devices`.
    """
    return max(min_reports, min_devices if first_attempt else 1)


class DataSettings(_Section, frozen=True, kw_only=True):
    """Private data of a device. It never leaves the device."""

    path: Annotated[
        str, _doc("CSV, JSON lines (.jsonl) or Parquet file, or the 'module:function' that returns examples.")
    ]
    text: Annotated[
        str, _doc("Column of the text. token_classification: the list of words. causal_lm: the text or the prompt.")
    ] = "text"
    text_pair: Annotated[
        str,
        _doc("Column of the second text. Empty: none. causal_lm: the answer; only the answer is trained on."),
    ] = ""
    label: Annotated[
        str,
        _doc("Column of the integer label. token_classification: a list with one label per word. causal_lm: unused."),
    ] = "label"
    num_labels: Annotated[int, _doc("Number of classes. Labels are 0..num_labels-1. causal_lm: unused.", ge=2)] = 2
    labels: Annotated[
        tuple[str, ...],
        _doc(
            "Names of the classes in the order of their indices. With them, the data may contain names. "
            "Empty: integers only."
        ),
    ] = ()
    holdout: Annotated[
        int, _doc("Number of examples held out from training, to measure the loss before and after each round.", ge=1)
    ] = 64

    def __post_init__(self) -> None:
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("labels must be at least 2 different names")

    @property
    def num_classes(self) -> int:
        """Number of classes: that of `labels`, or `num_labels` without names."""
        return len(self.labels) or self.num_labels


class SimulatedSettings(_Section, frozen=True, kw_only=True):
    """Cost model of a simulated device. `fedspine-edge simulate --mix` fills it from a device class."""

    flops_per_s: Annotated[float, _doc("Sustained training speed in floating-point operations per second.", gt=0)] = (
        40e9
    )
    step_s: Annotated[
        float, _doc("Constant time of a training step or evaluation batch, such as kernel launches, in seconds.", ge=0)
    ] = 0.02
    jitter: Annotated[float, _doc("Spread of a round's computing time (σ of a log-normal distribution).", ge=0)] = 0.0
    link_jitter: Annotated[float, _doc("Spread of a round's transfer time (σ of a log-normal distribution).", ge=0)] = (
        0.0
    )
    drift: Annotated[
        float, _doc("Drift of the speed from round to round (σ of a random walk of its logarithm).", ge=0)
    ] = 0.0
    disconnect_probability: Annotated[float, _doc("Probability of a disconnect during a round.", ge=0, lt=1)] = 0.0


class DeviceConfig(_Section, frozen=True, kw_only=True):
    """Settings of `fedspine-edge device`."""

    device_id: Annotated[Name, _doc("Identifier of the device, unique in the fleet and part of its topics.")]
    model: Annotated[str, _doc("Folder or Hugging Face hub id of the base model, the same on every device.")]
    data: DataSettings
    task: Annotated[Task, _doc("Task, the same as the fleet's.")] = "classification"
    fleet: Annotated[Name, _doc("Name of the fleet to join.")] = "fleet"
    state_dir: Annotated[str, _doc("Folder for the state of the device, which survives power loss.")] = "runs/device"
    device_class: Annotated[
        str,
        _doc(
            "Hardware class. New devices learn from the rewards of their class.",
            max_length=64,
            pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$",
        ),
    ] = "unknown"
    torch_threads: Annotated[int, _doc("Number of CPU threads of torch. 0: torch's default.", ge=0)] = 0
    torch_device: Annotated[
        Literal["auto", "cpu", "cuda"], _doc("Device to train on. `auto`: CUDA if it runs a kernel, otherwise the CPU.")
    ] = "auto"
    base_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8", "int4"],
        _doc("Precision of the frozen base model; fewer bits need less memory. Adapters and head are always float32."),
    ] = "float32"
    memory_limit_mib: Annotated[
        int,
        _doc(
            "Memory for training in MiB, beyond what Python and torch occupy. It limits the rank and the micro-batch. "
            "0: no limit.",
            ge=0,
            le=10**7,
        ),
    ] = 0
    time_kind: Annotated[
        Literal["measured", "modelled", "simulated"],
        _doc(
            "Completion time. `measured`: wall clock; `modelled`: CPU time × time_factor plus modelled transfer; "
            "`simulated`: cost model."
        ),
    ] = "measured"
    time_factor: Annotated[
        float, _doc("Slowdown of the emulated device class (modelled and simulated time only).", gt=0)
    ] = 1.0
    up_mbit_s: Annotated[float, _doc("Uplink in Mbit/s (modelled and simulated time only).", gt=0)] = 20.0
    down_mbit_s: Annotated[float, _doc("Downlink in Mbit/s (modelled and simulated time only).", gt=0)] = 50.0
    upload_dtype: Annotated[Literal["float32", "float16"], _doc("Precision of the uploaded adapter.")] = "float16"
    clip_update_norm: Annotated[float, _doc("Clip the L2 norm of an update before upload. 0: off.", ge=0)] = 0.0
    noise_std: Annotated[
        float, _doc("Standard deviation of Gaussian noise per element, as a multiple of the clip norm. 0: off.", ge=0)
    ] = 0.0
    reconnect_timeout_s: Annotated[
        float,
        _doc(
            "Time without a connection after which the device exits, in seconds. The first connection has 10 s.", gt=0
        ),
    ] = 3600.0
    seed: Annotated[int, _doc("Seed for the local data order and the noise.", ge=0)] = 0
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    simulated: SimulatedSettings = field(default_factory=SimulatedSettings)

    def __post_init__(self) -> None:
        if self.noise_std > 0 and self.clip_update_norm == 0:
            raise ValueError("noise_std needs clip_update_norm > 0, because the noise is scaled by the clip norm")

    @property
    def num_labels(self) -> int:
        """Number of classes of the task head; 0 for causal_lm, which uses the language model head."""
        return 0 if self.task == "causal_lm" else self.data.num_classes


def setting_names(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Return the dotted path of each setting in a file by its name, such as `text`: `data.text`."""
    names: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            names |= {inner: f"{name}.{path}" for inner, path in setting_names(hint).items()}
        else:
            own[name] = name
    return names | own


def load_config(path: str | Path, kind: type[T]) -> T:
    """Read a TOML file.

    Args:
        path: TOML file.
        kind: Type of the settings, `FleetConfig` or `DeviceConfig`.

    Raises `ConfigError` naming the file, the key and the allowed values.
    """
    return convert(_read_toml(path), kind, where=str(path))


def load_fleet_or_device_config(path: str | Path) -> FleetConfig | DeviceConfig:
    """Read a TOML file as `DeviceConfig` if it has a key that only devices have, otherwise as `FleetConfig`.

    Raises `ConfigError` as `load_config` does.
    """
    data = _read_toml(path)
    device_keys = set(DeviceConfig.__struct_fields__) - set(FleetConfig.__struct_fields__)
    if device_keys & data.keys():
        return convert(data, DeviceConfig, where=str(path))
    return convert(data, FleetConfig, where=str(path))


def _read_toml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return data
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist.",
            remedy="Start from examples/fleet.toml or examples/device.toml, which contain every setting.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"config file {path} is not valid TOML: {error}.",
            remedy="Put texts in quotes and section names in [brackets]; see examples/.",
        ) from error


RENAMED_SETTINGS = {
    "bandit.min_side": "bandit.min_leaf_width",
    "bandit.slack": "bandit.time_tolerance",
    "gate": "validation",
    "simulated.drop_out": "simulated.disconnect_probability",
    "training.lora_alpha_per_r": "training.lora_scaling",
    "training.warmup_share": "training.warmup_ratio",
}
"""Current name of each setting that was renamed after version 0.1. The old names are accepted with a warning."""

RENAMED_VALUES = {("target", "mean"): "fleet_mean", ("training.schedule", "hold"): "constant_then_cosine"}
"""Current value of each setting whose value was renamed after version 0.1, by setting and old value."""


def with_current_names(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of `data` with the current names of renamed settings, and one sentence per renamed setting.

    Raises `ConfigError` when a setting is present under its old and its new name.
    """
    current = {name: dict(value) if isinstance(value, dict) else value for name, value in data.items()}
    renamed = []
    for old, new in RENAMED_SETTINGS.items():
        section, _, key = old.rpartition(".")
        table = current.get(section) if section else current
        new_key = new.rpartition(".")[2]
        if not isinstance(table, dict) or key not in table:
            continue
        if new_key in table:
            raise ConfigError(f"`{old}` and `{new}` are the same setting.", remedy=f"Remove `{old}`, the old name.")
        table[new_key] = table.pop(key)
        renamed.append(f"`{old}` is now called `{new}`")
    for (name, old_value), new_value in RENAMED_VALUES.items():
        section, _, key = name.rpartition(".")
        table = current.get(section) if section else current
        if isinstance(table, dict) and table.get(key) == old_value:
            table[key] = new_value
            renamed.append(f'`{name} = "{old_value}"` is now written `{name} = "{new_value}"`')
    return current, renamed


def convert(data: dict[str, Any], kind: type[T], *, where: str = "") -> T:
    """Validate plain data against `kind`.

    Renamed settings are accepted and logged as warnings.

    Args:
        data: Settings as read from TOML.
        kind: Type of the settings.
        where: Origin of the data, with which errors begin.

    Raises `ConfigError` as `load_config` does.
    """
    place = f"{where}: " if where else ""
    try:
        data, renamed = with_current_names(data)
    except ConfigError as error:
        raise ConfigError(f"{place}{error.message}", remedy=error.remedy) from None
    for sentence in renamed:
        log.warning("%s%s; the old name will stop working in the next release.", place, sentence)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = re.sub(r"`\$\.([^`]+)`", r"`\1`", str(error))  # without msgspec's prefix for the root
        remedy = _suggestion(message, kind) if where else "Leave it out for the default."
        raise ConfigError(f"{place}{_explain_limit(message, data)}.", remedy=remedy) from None


_LIMITS = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}


def _explain_limit(message: str, data: dict[str, Any]) -> str:
    """Return msgspec's message about an out-of-range number in plain words, and any other message unchanged."""
    found = re.fullmatch(r"Expected `\w+` ([<>]=?) (\S+) - at `([\w.]+)`", message)
    if not found:
        return message
    value: Any = data
    for name in found[3].split("."):
        value = value[name]
    return f"`{found[3]}` is {value}; it must be {_LIMITS[found[1]]} {float(found[2]):g}"


def _suggestion(message: str, kind: type[msgspec.Struct]) -> str:
    """Return a remedy for a validation error: the closest known key for an unknown one."""
    unknown = re.search(r"unknown field `([^`]+)`", message)
    if not unknown:
        return "docs/reference/configuration.md lists every key with its type, limits and default."
    names = sorted({name for section in _sections(kind) for name in section.__struct_fields__})
    close = difflib.get_close_matches(unknown.group(1), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(names)}."


def _sections(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """Return `kind` and the types of all its sections."""
    found = [kind]
    for hint in get_type_hints(kind, include_extras=False).values():
        hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            found += _sections(hint)
    return found
