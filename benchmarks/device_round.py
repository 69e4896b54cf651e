"""Benchmark of one device round against PEFT with masked pruning: scored steps, a cut to 0.5, and the same steps again.

The competitor is LoRAPrune with the tools that a user has: PEFT's layers, importance by the same formula in eager
torch, and heads and channels that are masked instead of removed. Both start from the same random weights, see the same
batches and use the same fused AdamW. Peak memory is measured in a separate process: the highest resident memory during
training minus that before the model was built.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.kernels import reference

ROOT = Path(__file__).resolve().parent.parent
RATIO, RANK, LABELS = 0.5, 8, 2
SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
# Widths of the real models with a small vocabulary. SmolLM2 with 4 of its layers makes a round take seconds; with few
# layers the savings in the last one (docs/decisions/0027) have more weight.
CONFIGS: dict[str, dict[str, Any]] = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "SmolLM2, 4 of 30 layers": {**SMOLLM2, "num_hidden_layers": 4},
    "SmolLM2, 30 layers": {**SMOLLM2, "num_hidden_layers": 30},
}
MOST_STEPS = {"SmolLM2, 30 layers": 2}
"""Steps before and after the cut of models whose steps take seconds."""
VARIANTS = ("fedspine at 0.5", "fedspine, a whole round", "peft without pruning")


def build(name: str) -> nn.Module:
    """Return the task model with seeded random weights."""
    import transformers

    torch.manual_seed(0)
    shared = {**CONFIGS[name], "vocab_size": 2000, "num_labels": LABELS, "pad_token_id": 0}
    if "num_key_value_heads" in shared:
        return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shared, head_dim=64))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the package has no dropout either
    return transformers.BertForSequenceClassification(transformers.BertConfig(**shared, **no_dropout))


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 2000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % LABELS}


class Fedspine:
    """Training and pruning as on a device."""

    def __init__(self, name: str) -> None:
        from fedspine_edge.model.prunable import PrunableModel
        from fedspine_edge.pruning.importance import ImportanceTracker

        self.model = PrunableModel.from_module(build(name), task="classification")
        self.model.attach_lora(RANK, 2.0, seed=0)
        self.model.module.train()
        self.tracker = ImportanceTracker(self.model)
        self.optimizer = torch.optim.AdamW(self.model.trainable_parameters().values(), lr=1e-3, fused=True)

    def step(self, inputs: dict[str, Tensor], *, scored: bool) -> None:
        self.model(**inputs).loss.backward()
        if scored:
            self.tracker.update()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def prune(self) -> None:
        from fedspine_edge.pruning.selection import select_layout

        layout = select_layout(self.tracker.scores(), self.model.layout, RATIO)
        self.model.compact(layout, optimizer=self.optimizer, importance=self.tracker)


class PeftMasked:
    """PEFT's layers, with a mask on the inputs of o and down."""

    def __init__(self, name: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        from fedspine_edge.model.families import architecture_of

        module = build(name)
        self.architecture = architecture_of(module.config)
        targets = list(self.architecture.lora_targets)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, lora_dropout=0.0)
        self.module = inject_adapter_in_model(config, module).train()
        heads = int(module.config.num_attention_heads)
        self.kv_heads = int(getattr(module.config, "num_key_value_heads", None) or heads)
        self.parts: dict[str, Any] = {}
        self.scores: dict[tuple[int, str], Tensor] = {}
        for layer in range(module.config.num_hidden_layers):
            for part in self.architecture.linears:
                self.parts[f"layers.{layer}.{part}"] = module.get_submodule(
                    self.architecture.path(f"layers.{layer}.{part}")
                )
        for parameter_name, parameter in self.module.named_parameters():
            head = parameter_name.startswith(self.architecture.head_modules("classification"))
            parameter.requires_grad_(head or "lora_" in parameter_name)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], lr=1e-3, fused=True
        )

    def step(self, inputs: dict[str, Tensor], *, scored: bool) -> None:
        self.module(**inputs).loss.backward()
        if scored:
            self._score()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _score(self) -> None:
        for name, linear in self.parts.items():
            _, layer, part = name.split(".")
            ffn = part in ("up", "gate", "down")
            by_row = part not in ("o", "down")
            rows, cols = linear.weight.shape
            length = rows if by_row else cols
            groups = length if ffn else self.kv_heads
            group = torch.arange(length, dtype=torch.int32) // (length // groups)
            a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
            sums = reference.importance_accumulate(
                linear.weight,
                a,
                b,
                a.grad,
                b.grad,
                2.0,
                num_groups=groups,
                **{"group_of_row" if by_row else "group_of_col": group},
            )
            key = (int(layer), "channels" if ffn else "heads")
            normalized = sums / sums.norm().clamp_min(1e-30)
            self.scores[key] = 0.9 * self.scores[key] + 0.1 * normalized if key in self.scores else 0.1 * normalized

    def prune(self) -> None:
        for (layer, kind), score in self.scores.items():
            keep = torch.zeros_like(score)
            keep[score.topk(round(len(score) * (1 - RATIO))).indices] = 1.0
            linear = self.parts[f"layers.{layer}.{'down' if kind == 'channels' else 'o'}"]
            mask = keep.repeat_interleave(linear.weight.shape[1] // len(keep))
            linear.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask, *inputs[1:]))


def seconds_of_round(candidate: Fedspine | PeftMasked, inputs: dict[str, Tensor], tau: int) -> dict[str, float]:
    """Return the seconds of the scored steps, of the cut and of the steps after it."""
    times = {}
    for what, run in (
        ("scored steps", lambda: [candidate.step(inputs, scored=True) for _ in range(tau)]),
        ("cut", candidate.prune),
        ("steps after", lambda: [candidate.step(inputs, scored=False) for _ in range(tau)]),
    ):
        begin = time.perf_counter()
        run()
        times[what] = time.perf_counter() - begin
    return times


def run(name: str, *, tau: int, repetitions: int) -> dict[str, Any]:
    """Measure interleaved rounds of a model of `CONFIGS`; return the median by total time and peak memory. CPU only."""
    rows, tokens = 8, 48
    tau = min(tau, MOST_STEPS.get(name, tau))
    inputs = batch(rows, tokens)
    makers: dict[str, Callable[[str], Any]] = {"fedspine": Fedspine, "peft, masked": PeftMasked}
    for make in makers.values():
        seconds_of_round(make(name), inputs, 1)  # warm up
    rounds: dict[str, list[dict[str, float]]] = {key: [] for key in makers}
    for _ in range(repetitions):
        for key, make in makers.items():
            rounds[key].append(seconds_of_round(make(name), inputs, tau))
    middle = {key: sorted(one, key=lambda t: sum(t.values()))[len(one) // 2] for key, one in rounds.items()}
    totals = {key: sum(times.values()) for key, times in middle.items()}
    memory = {variant: round(peak_memory(name, variant), 1) for variant in VARIANTS}
    return {
        "op": "one device round",
        "case": name,
        "tokens": rows * tokens,
        "r": RANK,
        "dtype": "torch.float32",
        "tau": tau,
        "ratio": RATIO,
        "median_ms": {key: round(value * 1e3, 1) for key, value in totals.items()},
        "phases_ms": {key: {p: round(s * 1e3, 1) for p, s in times.items()} for key, times in middle.items()},
        "ratio_to_fedspine": {"peft, masked": round(totals["peft, masked"] / totals["fedspine"], 3)},
        "repetitions": repetitions,
        "peak_training_mib": memory,
        "peak_share_of_peft": {
            v: round(memory[v] / memory["peft without pruning"], 3) for v in VARIANTS if v.startswith("fedspine")
        },
    }


def peak_memory(name: str, variant: str) -> float:
    """Return the peak memory in MiB of a separate process."""
    command = [sys.executable, "-m", "benchmarks.device_round", name, variant]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["peak_mib"])


def measure_memory(name: str, variant: str) -> float:
    """Train a few steps in this process and return the peak in MiB above the memory of the libraries."""
    torch.set_num_threads(1)
    inputs = batch(8, 48)
    Fedspine(name), PeftMasked(name)  # import both libraries, whose memory does not count
    before = resident_mib("VmRSS")
    candidate = PeftMasked(name) if variant.startswith("peft") else Fedspine(name)
    if variant == "fedspine at 0.5":  # a device that was pruned in an earlier round
        candidate.step(inputs, scored=True)
        candidate.prune()
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM to the present resident memory
    for _ in range(3):
        candidate.step(inputs, scored=not variant.startswith("peft"))  # without pruning nothing is scored
    if variant == "fedspine, a whole round":
        candidate.prune()
        candidate.step(inputs, scored=False)
    return resident_mib("VmHWM") - before


def resident_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps({"peak_mib": measure_memory(sys.argv[1], sys.argv[2])}))
