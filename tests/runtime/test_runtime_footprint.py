"""Footprint of the runtime: constant memory over many runs, and few imported packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MEMORY_PROGRAM = """
import json, sys
from fedspine_edge import Session

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

texts = ["good", "a very very very bad film", "not good", "the board", ("bad", "film")]
with Session.load(sys.argv[1], backend="onnxruntime", threads=1) as session:
    decoder = session.manifest.task == "causal_lm"
    def once(number):
        if decoder:
            session.generate([1 + number % 50] * (1 + number % 7), max_new_tokens=2)
        else:
            session.classify(texts[number % 5])
    runs = int(sys.argv[2])
    for number in range(runs // 5):  # until allocators reach their final size
        once(number)
    before = resident()
    for number in range(runs):
        once(number)
print(json.dumps({"growth": resident() - before, "resident": before}))
"""


def growth_bytes(bundle, runs, timeout):
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(bundle), str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"{runs} runs: resident {found['resident'] / 2**20:.1f} MiB, grown by {found['growth'] / 1024:.0f} KiB")
    return found["growth"]


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_memory_is_constant_over_2_000_runs(shared_bundle, decoder_bundle, kind):
    # A leak of one KiB per run would appear as 2,000 KiB.
    assert growth_bytes(shared_bundle if kind == "classifier" else decoder_bundle, 2_000, 100) < 1024 * 1024


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_memory_is_constant_over_100_000_runs(shared_bundle, decoder_bundle, kind):
    assert growth_bytes(shared_bundle if kind == "classifier" else decoder_bundle, 100_000, 1100) < 2 * 1024 * 1024


FOOTPRINT_PROGRAM = """
import sys, time
start = time.perf_counter()
from fedspine_edge import Session
imported = time.perf_counter() - start
with Session.load(sys.argv[1], backend="onnxruntime", threads=1) as session:
    session.classify("a good film")
ready = time.perf_counter() - start
import json
print(json.dumps({
    "import_s": imported,
    "ready_s": ready,
    "resident": int(open("/proc/self/statm").read().split()[1]) * 4096,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def test_runtime_imports_few_packages(shared_bundle):
    done = subprocess.run(
        [sys.executable, "-c", FOOTPRINT_PROGRAM, str(shared_bundle)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({name: value for name, value in found.items() if name != "modules"})
    absent = {
        "torch",
        "transformers",
        "peft",
        "onnx",
        "scipy",
        "pandas",
        "matplotlib",
        "rich",
        "paho",
        "pycuda",
        "cuda",
    }
    assert absent.isdisjoint(found["modules"])
    assert {"numpy", "onnxruntime", "tokenizers", "msgspec", "safetensors"} <= set(found["modules"])
    assert found["resident"] < 150 * 2**20  # measured: docs/results/deployment.md
