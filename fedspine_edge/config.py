"""Settings of a fleet and of a device as msgspec structs that read from TOML.

Units are in the names. Every field carries its description, from which docs/configuration.md is checked. Unknown
keys, wrong types and impossible values are a `ConfigError` that names the key; nothing is mutated after loading.
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
    """Base of every section."""


class BrokerSettings(_Section, frozen=True, kw_only=True):
    """How to reach the MQTT 5 broker."""

    host: Annotated[str, _doc("Host name or address of the broker.")] = "127.0.0.1"
    port: Annotated[int, _doc("TCP port; 8883 is usual with TLS.", ge=1, le=65535)] = 1883
    username: Annotated[str, _doc("User name; empty for none.")] = ""
    password_file: Annotated[str, _doc("File whose first line is the password; empty for none.")] = ""
    ca_file: Annotated[str, _doc("PEM file of the authority that signed the broker's certificate; turns TLS on.")] = ""
    cert_file: Annotated[str, _doc("PEM file of this client's certificate (mutual TLS).")] = ""
    key_file: Annotated[str, _doc("PEM file of this client's private key.")] = ""
    keepalive_s: Annotated[int, _doc("Seconds of silence after which the broker sends the last will × 1.5.", ge=5)] = 30


class BanditSettings(_Section, frozen=True, kw_only=True):
    """S-UCB; see docs/algorithms.md, "S-UCB"."""

    discount: Annotated[float, _doc("λ: weight of a reward one round older.", gt=0, lt=1)] = 0.95
    exploration: Annotated[float, _doc("s: width of the confidence bound.", ge=0)] = 0.2
    min_leaf_width: Annotated[
        float, _doc("δ: a leaf is cut only while its longest normalised side exceeds this.", gt=0)
    ] = 0.25
    max_step: Annotated[float, _doc("Largest rise of a device's pruning ratio in one round.", gt=0, le=1)] = 0.25
    arm_choice: Annotated[
        Literal["paced", "uniform"],
        _doc("`paced`: among arms predicted to take as long as the slowest device must; `uniform`: among all."),
    ] = "paced"
    time_tolerance: Annotated[
        float,
        _doc("How far below that the logarithm of a paced arm's predicted time may lie: 0.05 is 4.9 %.", gt=0, lt=1),
    ] = 0.05
    prior: Annotated[Literal["none", "class"], _doc("`class` lets a new device start from its class's tree.")] = "class"


class RewardSettings(_Section, frozen=True, kw_only=True):
    """Weights of the reward terms; they must sum to 1. See docs/algorithms.md, "Reward"."""

    loss: Annotated[float, _doc("Weight of the relative fall of the held-out loss.", ge=0, le=1)] = 0.3
    time: Annotated[float, _doc("Weight of closeness to the mean completion time.", ge=0, le=1)] = 0.5
    lora: Annotated[float, _doc("Weight of the adapter's importance I(B_total).", ge=0, le=1)] = 0.2
    prune: Annotated[float, _doc("Weight of progress toward the pruning target.", ge=0, le=1)] = 0.0
    mode: Annotated[Literal["sum", "product"], _doc("`product` is the paper's shape, bounded.")] = "sum"

    def __post_init__(self) -> None:
        total = self.loss + self.time + self.lora + self.prune
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"reward weights sum to {total:g}; they must sum to 1")


class AggregationSettings(_Section, frozen=True, kw_only=True):
    """How adapters are combined. See docs/algorithms.md, "Aggregation"."""

    rule: Annotated[
        Literal["reconstruct", "zero_pad", "stack", "svd", "trimmed_mean", "median"],
        _doc(
            "`reconstruct` averages B·A exactly for mixed ranks and layouts; the others are baselines or robust rules."
        ),
    ] = "reconstruct"
    weight_by_importance: Annotated[bool, _doc("Multiply num_examples by I(B_total) in the device weights.")] = False
    complete_ranks: Annotated[
        bool,
        _doc("Complete a low-rank update with the components that the device was not given, so averaging keeps them."),
    ] = True
    clip_norm: Annotated[
        float, _doc("Scale a device's update down to this multiple of the median norm; 0 = off.", ge=0)
    ] = 0.0


class ValidationSettings(_Section, frozen=True, kw_only=True):
    """What the server accepts."""

    max_norm: Annotated[float, _doc("Largest L2 norm of B·A per module; above it an update is refused.", gt=0)] = 1e3
    keep_rejected: Annotated[
        int, _doc("How many refused updates are kept in run_dir/rejected for inspection.", ge=0)
    ] = 50


class TrainingSettings(_Section, frozen=True, kw_only=True):
    """Local optimisation, the same on every device."""

    tau: Annotated[int, _doc("Local iterations before pruning, all scored (the paper's τ).", ge=1)] = 20
    recovery_steps: Annotated[int, _doc("Local iterations after pruning.", ge=0)] = 20
    learning_rate: Annotated[float, _doc("Peak learning rate of AdamW.", gt=0)] = 1e-3
    batch_size: Annotated[int, _doc("Examples per step.", ge=1)] = 8
    max_length_tokens: Annotated[int, _doc("Longest text in tokens; longer ones are cut.", ge=4)] = 128
    schedule: Annotated[
        Literal["constant_then_cosine", "cosine"],
        _doc("`constant_then_cosine`: constant until pruning is over, then a cosine; `cosine`: over the whole run."),
    ] = "constant_then_cosine"
    warmup_ratio: Annotated[float, _doc("Share of a round's steps with rising learning rate.", ge=0, le=1)] = 0.1
    max_grad_norm: Annotated[float, _doc("Gradient clipping by global norm.", gt=0)] = 1.0
    weight_decay: Annotated[float, _doc("AdamW weight decay on adapters and head.", ge=0)] = 0.0
    lora_scaling: Annotated[float, _doc("scaling = lora_alpha / r, held constant over ranks.", gt=0)] = 2.0


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Optimisation settings that come with the plan, the same for every device of the fleet."""

    learning_rate: Annotated[float, Meta(gt=0.0)] = 1e-3
    batch_size: Annotated[int, Meta(ge=1)] = 8
    max_length_tokens: Annotated[int, Meta(ge=1)] = 48
    warmup_ratio: Annotated[float, Meta(ge=0.0, le=1.0)] = field(default=0.1, name="warmup_share")
    """Share of a round's steps over which the learning rate rises linearly, since moments start at zero."""
    max_grad_norm: Annotated[float, Meta(gt=0.0)] = 1.0
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.0
    first_step: Annotated[int, Meta(ge=0)] = 0
    """Steps taken before this round."""
    total_steps: Annotated[int, Meta(ge=1)] = 1
    """Steps of the whole run, at whose end the learning rate reaches zero."""
    decay_from_step: Annotated[int, Meta(ge=0)] = 0
    """Step of the run at which the learning rate begins its cosine; before it stays at its peak."""


class FleetConfig(_Section, frozen=True, kw_only=True):
    """Settings of `fedspine-edge server`."""

    fleet: Annotated[Name, _doc("Name of the fleet; part of every topic.")] = "fleet"
    run_dir: Annotated[str, _doc("Folder of the journal, the blobs and the final adapter.")] = "runs/fleet"
    task: Annotated[Task, _doc("What the fleet learns; a device with another task is refused.")] = "classification"
    num_rounds: Annotated[
        int,
        _doc(
            "Server rounds. The last two only tune, with layout `consensus` the first only scores, and strategies that "
            "prune step by step need pruning_ratio / bandit.max_step between: 5 in all at the defaults.",
            ge=3,
        ),
    ] = 10
    pruning_ratio: Annotated[float, _doc("P: share of prunable parameters to remove by the end.", ge=0, lt=1)] = 0.5
    target: Annotated[
        Literal["equal", "fleet_mean"],
        _doc("`fleet_mean` lets final ratios differ by device (±0.15) around pruning_ratio."),
    ] = "equal"
    ranks: Annotated[tuple[int, ...], _doc("LoRA ranks the bandit may choose, each 1..256.")] = (4, 8, 16, 32)
    strategy: Annotated[
        str,
        _doc("fedspine, fixed, fedlora, hetlora, fedapt, prune_then_tune, tune_then_prune, or 'module:attribute'."),
    ] = "fedspine"
    layout: Annotated[
        Literal["consensus", "local"], _doc("`consensus`: one order for the fleet; `local`: every device ranks alone.")
    ] = "consensus"
    criterion: Annotated[Literal["lora", "apt", "magnitude", "random"], _doc("What ranks heads and channels.")] = "lora"
    importance_metric: Annotated[
        Literal["auto", "abs", "square", "signed", "group"],
        _doc(
            "How criterion `lora` sums a group's terms: absolute values as in LoRAPrune (`abs`), or the absolute value "
            "of their sum (`group`); `auto` = `group` for language models."
        ),
    ] = "auto"
    scope: Annotated[
        Literal["layer", "global"],
        _doc("`layer`: equal widths; `global`: layers compete, which needs layout `local`."),
    ] = "layer"
    round_to: Annotated[int, _doc("Kept channel counts are multiples of this.", ge=1)] = 8
    download_dtype: Annotated[
        Literal["float32", "float16"], _doc("Precision of the fleet's adapter and head on their way to the devices.")
    ] = "float16"
    min_devices: Annotated[int, _doc("Devices that must be online before round 1 starts.", ge=1)] = 1
    join_timeout_s: Annotated[float, _doc("How long to wait for min_devices.", gt=0)] = 600.0
    deadline_s: Annotated[float, _doc("Wall-clock limit of one round; all other timeouts derive from it.", gt=0)] = (
        600.0
    )
    min_reports: Annotated[int, _doc("Reports without which a round is repeated instead of aggregated.", ge=1)] = 1
    max_failed_rounds: Annotated[int, _doc("Consecutive failed rounds after which the run stops.", ge=1)] = 3
    base_sha256: Annotated[str, _doc("Pin the base model's digest; empty = the first device's.")] = ""
    seed: Annotated[int, _doc("Seed of adapters, bandit and data order.", ge=0)] = 0
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
            raise ValueError('scope "global" needs layout "local": the consensus order gives every layer one width')


class DataSettings(_Section, frozen=True, kw_only=True):
    """A device's private data. It never leaves the device."""

    path: Annotated[str, _doc("CSV, JSON lines (.jsonl) or Parquet file, or 'module:function' that returns examples.")]
    text: Annotated[
        str, _doc("Column of the text. token_classification: of the list of words. causal_lm: of the text or prompt.")
    ] = "text"
    text_pair: Annotated[
        str,
        _doc("Column of the second text; empty for none. causal_lm: of the answer, which alone is learned."),
    ] = ""
    label: Annotated[
        str, _doc("Column of the integer label. token_classification: of a list with one per word. Not for causal_lm.")
    ] = "label"
    num_labels: Annotated[
        int, _doc("Number of classes; labels are 0..num_labels-1. Without meaning for causal_lm.", ge=2)
    ] = 2
    holdout: Annotated[
        int, _doc("Examples kept out of training to measure loss before and after each round.", ge=1)
    ] = 64


class SimulatedSettings(_Section, frozen=True, kw_only=True):
    """The device that simulated time stands for; `fedspine-edge simulate --mix` fills this from a profile."""

    flops_per_s: Annotated[float, _doc("Sustained rate of training, in float operations a second.", gt=0)] = 40e9
    step_s: Annotated[
        float, _doc("Time of a step or evaluation batch that does not shrink with the model (launches).", ge=0)
    ] = 0.02
    jitter: Annotated[float, _doc("Spread of a round's computing time around its mean (log-normal σ).", ge=0)] = 0.0
    link_jitter: Annotated[float, _doc("Spread of a round's transfer time around its mean (log-normal σ).", ge=0)] = 0.0
    drift: Annotated[
        float, _doc("How far speed wanders from round to round (σ of a random walk of its logarithm).", ge=0)
    ] = 0.0
    disconnect_probability: Annotated[float, _doc("Probability of a disconnect in a round.", ge=0, lt=1)] = 0.0


class DeviceConfig(_Section, frozen=True, kw_only=True):
    """Settings of `fedspine-edge device`."""

    device_id: Annotated[Name, _doc("Unique in the fleet; part of the device's topics.")]
    model: Annotated[str, _doc("Folder (or hub id) of the base model, the same on every device.")]
    data: DataSettings
    task: Annotated[Task, _doc("What is learned from the data; the fleet must have the same.")] = "classification"
    fleet: Annotated[Name, _doc("Name of the fleet to join.")] = "fleet"
    state_dir: Annotated[str, _doc("Folder where the device keeps its state across power loss.")] = "runs/device"
    device_class: Annotated[str, _doc("Hardware class, for warm starts and reports.")] = "unknown"
    torch_threads: Annotated[int, _doc("CPU threads for torch; 0 leaves torch's default.", ge=0)] = 0
    torch_device: Annotated[
        Literal["auto", "cpu", "cuda"], _doc("Where to train; `auto` takes CUDA if a kernel runs.")
    ] = "auto"
    base_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8", "int4"],
        _doc(
            "How this device keeps the frozen base: fewer bits for less memory. Adapters and head are float32 always."
        ),
    ] = "float32"
    memory_limit_mib: Annotated[
        int,
        _doc(
            "Memory to train in, beyond what Python and torch take; rank and micro-batch obey it. 0 = not stated.",
            ge=0,
        ),
    ] = 0
    time_kind: Annotated[
        Literal["measured", "modelled", "simulated"],
        _doc(
            "measured: wall clock. modelled: process CPU time × time_factor + modelled transfer. simulated: cost model."
        ),
    ] = "measured"
    time_factor: Annotated[float, _doc("Slowness of the emulated class (modelled and simulated time only).", gt=0)] = (
        1.0
    )
    up_mbit_s: Annotated[float, _doc("Modelled uplink (modelled and simulated time only).", gt=0)] = 20.0
    down_mbit_s: Annotated[float, _doc("Modelled downlink (modelled and simulated time only).", gt=0)] = 50.0
    upload_dtype: Annotated[Literal["float32", "float16"], _doc("Precision of the adapter on its way up.")] = "float16"
    clip_update_norm: Annotated[float, _doc("Clip the update's L2 norm before upload; 0 = off.", ge=0)] = 0.0
    noise_std: Annotated[float, _doc("Gaussian noise per element, as a multiple of the clip norm; 0 = off.", ge=0)] = (
        0.0
    )
    reconnect_timeout_s: Annotated[
        float, _doc("Give up after so long without the broker; the first connection is given 10 s.", gt=0)
    ] = 3600.0
    seed: Annotated[int, _doc("Seed of the local data order.", ge=0)] = 0
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    simulated: SimulatedSettings = field(default_factory=SimulatedSettings)

    def __post_init__(self) -> None:
        if self.noise_std > 0 and self.clip_update_norm == 0:
            raise ValueError("noise_std needs clip_update_norm > 0, since noise is scaled by the clip norm")

    @property
    def num_labels(self) -> int:
        """Classes of the task head; 0 for causal_lm, whose head is the model's own."""
        return 0 if self.task == "causal_lm" else self.data.num_labels


def setting_names(kind: type[msgspec.Struct]) -> dict[str, str]:
    """How a file writes each setting of `kind`, by the setting's own name: `text` is data.text."""
    names: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            names |= {inner: f"{name}.{path}" for inner, path in setting_names(hint).items()}
        else:
            own[name] = name
    return names | own


def load(path: str | Path, kind: type[T]) -> T:
    """Read a TOML file into `kind` (`FleetConfig` or `DeviceConfig`).

    Raises `ConfigError` naming the file, the key and the allowed values.
    """
    return convert(_read(path), kind, where=str(path))


def load_either(path: str | Path) -> FleetConfig | DeviceConfig:
    """Read a TOML file as a device's settings if it has any key that only those have, else as a fleet's. Raises as
    `load` does."""
    data = _read(path)
    of_device = set(DeviceConfig.__struct_fields__) - set(FleetConfig.__struct_fields__)
    if of_device & data.keys():
        return convert(data, DeviceConfig, where=str(path))
    return convert(data, FleetConfig, where=str(path))


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return data
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist.", remedy="examples/fleet.toml and examples/device.toml are complete."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"config file {path} is not valid TOML: {error}.",
            remedy="Texts need quotes, sections [brackets]; see examples/.",
        ) from error


RENAMED_SETTINGS = {
    "bandit.min_side": "bandit.min_leaf_width",
    "bandit.slack": "bandit.time_tolerance",
    "gate": "validation",
    "simulated.drop_out": "simulated.disconnect_probability",
    "training.lora_alpha_per_r": "training.lora_scaling",
    "training.warmup_share": "training.warmup_ratio",
}
"""Settings by their name before version 0.2, which is still accepted with a warning."""

RENAMED_VALUES = {("target", "mean"): "fleet_mean", ("training.schedule", "hold"): "constant_then_cosine"}
"""Values of settings, renamed likewise."""


def with_current_names(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `data` with renamed settings under their current names, and a sentence about each that was renamed.

    A setting that is present under both names is left alone, so that the old one is reported as unknown.
    """
    current = {name: dict(value) if isinstance(value, dict) else value for name, value in data.items()}
    renamed = []
    for old, new in RENAMED_SETTINGS.items():
        section, _, key = old.rpartition(".")
        table = current.get(section) if section else current
        new_key = new.rpartition(".")[2]
        if isinstance(table, dict) and key in table and new_key not in table:
            table[new_key] = table.pop(key)
            renamed.append(f"`{old}` is now called `{new}`")
    for (name, old_value), new_value in RENAMED_VALUES.items():
        section, _, key = name.rpartition(".")
        table = current.get(section) if section else current
        if isinstance(table, dict) and table.get(key) == old_value:
            table[key] = new_value
            renamed.append(f'`{name} = "{old_value}"` is now written "{new_value}"')
    return current, renamed


def convert(data: dict[str, Any], kind: type[T], *, where: str = "") -> T:
    """Validate plain data against `kind`; errors begin with `where` it is from.

    Renamed settings are accepted and logged as a warning. Raises `ConfigError` as `load` does.
    """
    data, renamed = with_current_names(data)
    for sentence in renamed:
        log.warning(
            "%s%s; the old name will stop working in the next release.", f"{where}: " if where else "", sentence
        )
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = re.sub(r"`\$\.([^`]+)`", r"`\1`", str(error))  # the path from the root is the name itself
        remedy = _suggest(message, data, kind) if where else "Leave it out for the default."
        place = f"{where}: " if where else ""
        raise ConfigError(f"{place}{_limit_in_words(message, data)}.", remedy=remedy) from None


_LIMITS = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}


def _limit_in_words(message: str, data: dict[str, Any]) -> str:
    """A number's limit as in this package's other errors, with the number; `message` itself where it is no limit."""
    found = re.fullmatch(r"Expected `\w+` ([<>]=?) (\S+) - at `([\w.]+)`", message)
    if not found:
        return message
    value: Any = data
    for name in found[3].split("."):
        value = value[name]
    return f"`{found[3]}` is {value}; it must be {_LIMITS[found[1]]} {float(found[2]):g}"


def _suggest(message: str, data: dict[str, Any], kind: type[msgspec.Struct]) -> str:
    unknown = re.search(r"unknown field `([^`]+)`", message)
    if not unknown:
        return "docs/configuration.md lists every key with its type, limits and default."
    names = sorted({name for section in _sections(kind) for name in section.__struct_fields__})
    close = difflib.get_close_matches(unknown.group(1), names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(names)}."


def _sections(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    found = [kind]
    for hint in get_type_hints(kind, include_extras=False).values():
        hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            found += _sections(hint)
    return found
