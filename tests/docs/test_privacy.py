"""docs/concepts/privacy.md lists exactly what the code lets leave a device."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from fedspine_edge.config import DeviceConfig
from fedspine_edge.errors import BlobError
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import ALLOWED_TENSORS
from fedspine_edge.protocol.messages import Report, Status

PAGE = (Path(__file__).parents[2] / "docs" / "concepts" / "privacy.md").read_text(encoding="utf-8")


def listed(heading: str) -> list[str]:
    """Names in the first column of the table under a heading that begins with `heading`."""
    section = PAGE.split(f"\n### {heading}")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("kind", [Status, Report], ids=lambda kind: kind.__name__)
def test_every_field_that_leaves_a_device_is_listed_and_no_other(kind: type[Status | Report]) -> None:
    names = listed(kind.__name__)
    assert sorted(names) == sorted(kind.__struct_fields__)


def expand(name: str) -> list[str]:
    parts = ("q", "k", "v", "o", "up", "gate", "down") if "{part}" in name else ("",)
    return [
        name.replace("{i}", str(i)).replace("{part}", part).replace("{name}", "classifier.weight")
        for i, part in itertools.product((0, 31), parts)
    ]


def test_every_listed_tensor_is_allowed() -> None:
    for name in listed("The update"):
        codec.check_names(expand(name), "update")


def test_every_allowed_pattern_is_listed() -> None:
    """Each pattern of the allow-list, stripped of a listed name at a time, must not allow anything that is left."""
    examples = [example for name in listed("The update") for example in expand(name)]
    for pattern, _ in ALLOWED_TENSORS["update"]:
        assert any(pattern.fullmatch(example) for example in examples), pattern.pattern
    # The alternatives inside the patterns: every word that a pattern names is a word of the page's table.
    words = set(re.findall(r"[a-z]{2,}", " ".join(listed("The update")))) | {"up", "gate", "down"}
    for pattern, _ in ALLOWED_TENSORS["update"]:
        assert set(re.findall(r"[a-z]{2,}", re.sub(r"\[.*?\]", "", pattern.pattern))) <= words, pattern.pattern


@pytest.mark.parametrize("name", ["text", "order.0.heads", "layers.0.q.weight", "embeddings", "labels", "examples.0"])
def test_what_is_not_listed_cannot_be_sent(name: str) -> None:
    with pytest.raises(BlobError, match="allow-list"):
        codec.check_names([name], "update")


def test_it_names_the_settings_by_their_real_names_and_says_the_plain_things() -> None:
    for key in ("clip_update_norm", "noise_std"):
        assert key in DeviceConfig.__struct_fields__
        assert f"\n    {key} = " in PAGE
    for sentence in ("the server sees each device's update", "No ε is claimed", "no secure aggregation"):
        assert sentence in PAGE
