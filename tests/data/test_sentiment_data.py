"""Sentiment data of the demo: real sentences, disjoint parts, partitioned by domain."""

from collections import Counter

import pytest

from fedspine_edge.data import sentiment
from fedspine_edge.errors import DataError


@pytest.fixture(scope="module")
def split() -> sentiment.Split:
    return sentiment.load()


def test_every_domain_has_both_labels_in_both_parts(split: sentiment.Split) -> None:
    for part in (split.train, split.test):
        counts = Counter((s.domain, s.label) for s in part)
        assert all(counts[domain, label] > 100 for domain in sentiment.DOMAINS for label in (0, 1))


def test_every_prefix_is_a_fair_sample(split: sentiment.Split) -> None:
    sample = sentiment.balanced(split.test, 300)
    assert Counter(s.domain for s in sample) == dict.fromkeys(sentiment.DOMAINS, 300)
    movies = [s.label for s in sample if s.domain == "movies"]
    assert 120 < sum(movies) < 180


def test_no_text_is_in_both_parts(split: sentiment.Split) -> None:
    assert not {s.text.lower() for s in split.train} & {s.text.lower() for s in split.test}


@pytest.mark.parametrize("num_devices", [1, 4, 6])
def test_partition_gives_each_device_one_domain(split: sentiment.Split, num_devices: int) -> None:
    shares = sentiment.partition(split.train, num_devices)
    assert all(len({s.domain for s in share}) == 1 for share in shares)
    texts = [s.text for share in shares for s in share]
    assert len(texts) == len(set(texts))
    if num_devices >= len(sentiment.DOMAINS):
        assert len(texts) == len(split.train)


def test_damaged_cache_is_downloaded_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sentiment, "_FETCH_TIMEOUT_S", 0.01)
    (tmp_path / "fedspine_edge").mkdir()
    (tmp_path / "fedspine_edge" / "vaderSentiment-2.5.tar.gz").write_bytes(b"truncated")
    with pytest.raises(DataError, match="timed out"):
        sentiment.fetch()
