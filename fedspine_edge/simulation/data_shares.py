"""Partition of a task's data into one file per device, and a test set that no device trains on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data import sentiment
from fedspine_edge.data.examples import Example
from fedspine_edge.data.loading import read_examples
from fedspine_edge.errors import ConfigError, DataError

_TEST_SHARE = 0.15


def prepare_data(
    folder: Path,
    *,
    num_devices: int,
    data: Path | None = None,
    num_labels: int = 2,
    test_examples: int = 1200,
    dirichlet: float | None = None,
    seed: int = 0,
) -> tuple[list[Path], Path]:
    """Write classification data for each device, and the common test set, to `folder`.

    Args:
        folder: Folder that receives `device-K.csv` and `test.csv`.
        num_devices: Number of shares.
        data: The user's file; None for the four-domain sentiment data, partitioned by domain.
        num_labels: Number of classes in the user's file.
        test_examples: Maximum size of the test set.
        dirichlet: α of a Dirichlet draw of each label over the devices. None partitions the sentiment data by domain,
            and assigns the rows of a user's file round-robin.
        seed: Seed for the Dirichlet draw.

    Returns:
        The paths of the shares and of the test set.
    """
    if num_devices < 1:
        raise ConfigError(f"--devices is {num_devices}; a fleet needs at least one device.")
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        split = sentiment.load(test_share=_TEST_SHARE)
        if dirichlet is None:
            shares = sentiment.partition(split.train, num_devices)
        else:
            shares = sentiment.dirichlet(split.train, num_devices, alpha=dirichlet, seed=seed)
        test = sentiment.balanced(split.test, test_examples // len(sentiment.DOMAINS))
    else:
        shares, test = _split_user_data(data, num_labels, num_devices, test_examples)
        if dirichlet is not None:
            rows = [row for share in shares for row in share]
            shares = sentiment.dirichlet(rows, num_devices, alpha=dirichlet, seed=seed)
    paths = [folder / f"device-{index + 1}.csv" for index in range(num_devices)]
    for path, share in zip(paths, shares):
        sentiment.write_csv(path, share)
    test_csv = folder / "test.csv"
    sentiment.write_csv(test_csv, test)
    return paths, test_csv


def find_shares(folder: Path, num_devices: int) -> tuple[list[Path], Path]:
    """Return the shares and the test set of data that the user has partitioned.

    The folder holds `device-1.csv`, `device-2.csv`, … and `test.csv` with the columns text and label. Raises
    `DataError` naming the first missing file.
    """
    shares, test_csv = [folder / f"device-{index + 1}.csv" for index in range(num_devices)], folder / "test.csv"
    for path in (*shares, test_csv):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist.",
                remedy="A folder of partitioned data has the files device-1.csv, device-2.csv, … and test.csv.",
            )
    return shares, test_csv


def partition_data(folder: Path, *, data: DataSettings, task: Task, num_devices: int) -> list[Path]:
    """Assign the examples of `data` to devices round-robin, and write them as `device-K.jsonl` to `folder`.

    The function supports every task, and keeps the column names of `data`. Raises `DataError` for too few examples.
    """
    examples = read_examples(data.path, data, task)
    if len(examples) < 3 * num_devices:  # enough to train on and to hold out
        raise DataError(
            f"{data.path} has {len(examples)} examples, fewer than 3 per device.",
            remedy="Use fewer --num-devices or more data.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"device-{index + 1}.jsonl" for index in range(num_devices)]
    for index, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as file:
            for example in examples[index::num_devices]:
                file.write(json.dumps(_row(example, data, task)) + "\n")
    return paths


def _row(example: Example, data: DataSettings, task: Task) -> dict[str, Any]:
    if task == "token_classification":
        return {data.text: example.words, data.label: example.word_labels}
    pair = {} if example.text_pair is None else {data.text_pair: example.text_pair}
    label = {} if task == "causal_lm" else {data.label: example.label}
    return {data.text: example.text, **pair, **label}


def _split_user_data(
    path: Path, num_labels: int, num_devices: int, test_examples: int
) -> tuple[list[list[sentiment.Sentence]], list[sentiment.Sentence]]:
    """Select the test set by a hash of the text, and assign the remaining rows to the devices round-robin."""
    test: list[sentiment.Sentence] = []
    train: list[sentiment.Sentence] = []
    for example in read_examples(DataSettings(path=str(path), num_labels=num_labels)):
        bucket = int.from_bytes(hashlib.sha256(example.text.encode()).digest()[:4], "big") / 2**32
        row = sentiment.Sentence("", example.text, example.label)
        (test if bucket < _TEST_SHARE else train).append(row)
    test = test[:test_examples]
    shares = [train[k::num_devices] for k in range(num_devices)]
    if not test or not all(shares):
        raise DataError(
            f"{path} has too few usable rows ({len(train) + len(test)}) for {num_devices} devices and a test set.",
            remedy="Use fewer --devices or more data.",
        )
    return shares, test
