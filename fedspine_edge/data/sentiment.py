"""Sentiment data of four domains for the demo and the experiments: movies, tweets, products, editorials.

The data are human-rated sentences of Hutto & Gilbert (ICWSM 2014), which the source package of vaderSentiment 2.5
contains (MIT licence). The package is downloaded by hash with pip, cached in the user's cache folder, and only read as
data: nothing in it is installed or run. The sentences are not part of this repository.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspine_edge.errors import DataError

DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
_PACKAGE = "vaderSentiment"
_VERSION = "2.5"
_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
_INNER = f"{_PACKAGE}-{_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
_NEUTRAL = 0.3
"""Sentences with a mean valence (−4..4) within ±0.3 have no clear sentiment and are skipped."""
_FETCH_TIMEOUT_S = 300


@dataclass(frozen=True)
class Sentence:
    """A rated sentence. `label` is 1 for positive."""

    domain: str
    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Disjoint training and test sentences. No text is in both."""

    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]


def cache_dir() -> Path:
    """Return the folder for downloaded data, according to XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedspine_edge"


def load(*, test_share: float = 0.15) -> Split:
    """Load all sentences, ordered by the hash of their text.

    Args:
        test_share: Share of the sentences, from the beginning, that are the test part.

    Raises `DataError` when the data is not cached and cannot be downloaded.
    """
    found: dict[str, Sentence] = {}
    for domain, text, valence in _read(fetch()):
        key = re.sub(r"\W+", " ", text.lower()).strip()
        if abs(valence) > _NEUTRAL and key:
            found.setdefault(hashlib.sha256(key.encode()).hexdigest(), Sentence(domain, text, int(valence > 0)))
    # ordered by hash, because the files are sorted by label and every prefix should be a fair sample
    ordered = sorted(found.items())
    first_train = int(test_share * len(ordered))
    sentences = tuple(sentence for _, sentence in ordered)
    return Split(train=sentences[first_train:], test=sentences[:first_train])


def fetch() -> Path:
    """Return the path of the cached source package. Downloads it with pip if it is not cached."""
    cached = cache_dir() / f"{_PACKAGE}-{_VERSION}.tar.gz"
    if cached.is_file() and _sha256(cached) == _SHA256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as temp:
        requirement = Path(temp) / "requirement.txt"
        requirement.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--require-hashes", "-r", str(requirement), "-d", temp]
        remedy = (
            f"Download it on a machine with a network (pip download --no-deps --no-binary :all: {_PACKAGE}=={_VERSION})"
            f" and put the file at {cached}."
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise DataError("the download of the sentiment data timed out.", remedy=remedy) from None
        found = list(Path(temp).glob("*.tar.gz"))
        if done.returncode or not found or _sha256(found[0]) != _SHA256:
            last_line = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise DataError(f"the sentiment data could not be downloaded: {last_line}", remedy=remedy)
        os.replace(found[0], cached)
    return cached


def partition(sentences: Iterable[Sentence], num_devices: int) -> list[list[Sentence]]:
    """Partition by domain: device k gets sentences of domain k mod 4 only. Devices of one domain share it evenly."""
    domains = list(DOMAINS)
    shares: list[list[Sentence]] = [[] for _ in range(num_devices)]
    by_domain: dict[str, list[Sentence]] = {domain: [] for domain in domains}
    for sentence in sentences:
        by_domain[sentence.domain].append(sentence)
    for index, domain in enumerate(domains):
        holders = range(index, num_devices, len(domains))
        for turn, sentence in enumerate(by_domain[domain]):
            if holders:
                shares[holders[turn % len(holders)]].append(sentence)
    return shares


def dirichlet(
    sentences: Sequence[Sentence], num_devices: int, *, alpha: float, seed: int = 0, at_least: int = 16
) -> list[list[Sentence]]:
    """Partition by label: the sentences of each label are divided in proportions drawn from Dirichlet(α).

    Args:
        sentences: Sentences to partition.
        num_devices: Number of devices.
        alpha: Concentration α; lower values give more unequal label shares.
        seed: Seed for the proportions.
        at_least: Smallest number of sentences per device, taken from the devices with the most.

    Raises `DataError` for too few sentences.
    """
    if len(sentences) < at_least * num_devices:
        raise DataError(
            f"{len(sentences)} sentences are too few for {num_devices} devices.", remedy="Use fewer devices."
        )
    rng = np.random.default_rng([seed, 0xD1])
    shares: list[list[Sentence]] = [[] for _ in range(num_devices)]
    for label in sorted({s.label for s in sentences}):
        members = [s for s in sentences if s.label == label]
        cuts = (np.cumsum(rng.dirichlet([alpha] * num_devices))[:-1] * len(members)).astype(int)
        order = rng.permutation(len(members))
        for share, chosen in zip(shares, np.split(order, cuts)):
            share += [members[i] for i in chosen]
    for share in shares:
        while len(share) < at_least:
            largest = max(shares, key=len)
            share.append(largest.pop())
    return shares


def balanced(sentences: Sequence[Sentence], per_domain: int) -> list[Sentence]:
    """Return the first `per_domain` sentences of each domain."""
    taken: list[Sentence] = []
    for domain in DOMAINS:
        taken += [s for s in sentences if s.domain == domain][:per_domain]
    return taken


def write_csv(path: Path, sentences: Iterable[Sentence]) -> None:
    """Write a CSV file with the columns domain, text and label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", "text", "label"])
        writer.writerows([s.domain, s.text, s.label] for s in sentences)


def _read(package: Path) -> Iterable[tuple[str, str, float]]:
    with tarfile.open(package) as outer:
        member = outer.extractfile(_INNER)
        if member is None:
            raise DataError(
                f"{package} does not contain {_INNER}.", remedy="Delete the file; it will be downloaded again."
            )
        inner_bytes = member.read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for domain, name in DOMAINS.items():
            file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
            assert file is not None, name
            for line in file.read().decode("latin-1").splitlines():
                _, valence, text = line.split("\t", 2)
                yield domain, text.strip(), float(valence)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
