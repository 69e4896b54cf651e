"""Reads adapter_config.json of PEFT and validates that the adapter is plain LoRA."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import ADAPTER_CONFIG

_UNDERSTOOD = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
        # settings of training, and of which modules were adapted, which the tensors show
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "modules_to_save"),
        *("layers_to_transform", "layers_pattern", "target_parameters"),
        # settings of features that other keys enable
        *("megatron_core", "use_qalora", "qalora_group_size", "eva_config", "loftq_config", "corda_config"),
        *("lora_ga_config", "ensure_weight_tying"),
    }
)
"""Keys that do not change how a plain adapter is applied. Any other key must be unset."""

_INITIALIZATIONS = ("none", "true", "false", "gaussian", "eva", "mica", "orthogonal")
"""Values of `init_lora_weights` that leave the base unchanged; with others the adapter fits only a changed base."""


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and scalings of a plain LoRA adapter."""

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read `folder`/adapter_config.json.

        Raises `CheckpointError` if it is missing or damaged, or if the adapter is not plain LoRA. Settings that are not
        understood are rejected, because they can change how an adapter is applied.
        """
        path = folder / ADAPTER_CONFIG
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
            kind, r, alpha = str(config["peft_type"]), int(config["r"]), float(config["lora_alpha"])
            patterns = [_pattern(config.get(name)) for name in ("rank_pattern", "alpha_pattern")]
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {ADAPTER_CONFIG}.", remedy="Pass a PEFT adapter folder.") from None
        except (OSError, ValueError, KeyError, TypeError, re.error) as error:
            raise CheckpointError(
                f"{path} is damaged: {error!r}.", remedy="Copy the file again from where the adapter was saved."
            ) from error
        reason = _why_not_plain(config, kind, r, alpha)
        if reason:
            raise CheckpointError(
                f"{path}: only plain LoRA adapters without biases can be loaded ({reason}).",
                remedy="Merge it into its base with PEFT's merge_and_unload, and load the merged model.",
            )
        initialization = config.get("init_lora_weights")
        if str(initialization).lower() not in _INITIALIZATIONS:
            raise CheckpointError(
                f"{path}: the adapter's initialization ({initialization}) changed the base weights too.",
                remedy="Save it from PEFT with path_initial_model_for_weight_conversion, which converts it to plain "
                "LoRA.",
            )
        return cls(path, r, alpha, bool(config.get("use_rslora")), *patterns)

    def rank(self, module: str | None) -> float:
        """Return the rank of a module, or the default rank for None."""
        return _match(self.rank_pattern, module, float(self.r))

    def scaling(self, module: str | None) -> float:
        """Return lora_alpha / r (or / sqrt(r) with rsLoRA) of a module, or the default one for None."""
        r = self.rank(module)
        return _match(self.alpha_pattern, module, self.lora_alpha) / (r**0.5 if self.use_rslora else r)


def _pattern(value: Any) -> dict[str, float]:
    """Return a rank or alpha pattern with valid regular expressions and positive numbers."""
    pattern = {str(key): float(number) for key, number in dict(value or {}).items()}
    for key, number in pattern.items():
        re.compile(rf"(.*\.)?({key})")
        if number <= 0:
            raise ValueError(f"{key}: {number:g}")
    return pattern


def _match(pattern: dict[str, float], module: str | None, default: float) -> float:
    """Return the value whose key equals the module or matches the end of its path, as in PEFT."""
    for key, value in pattern.items():
        if module is not None and (module == key or re.fullmatch(rf"(.*\.)?({key})", module)):
            return value
    return default


def _why_not_plain(config: dict[str, Any], kind: str, r: int, alpha: float) -> str:
    if kind != "LORA" or r < 1 or not 0 < alpha < float("inf"):
        return f"this is {kind}, r {r}, alpha {alpha:g}"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r}"
    unknown = [name for name, value in config.items() if name not in _UNDERSTOOD and value not in (None, False, [], {})]
    return f"{unknown[0]} is set" if unknown else ""
