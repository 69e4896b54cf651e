"""Checks that docs/reference/python-api.md lists the public names."""

from __future__ import annotations

import re
from pathlib import Path

import fedspine_edge

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "python-api.md"


def test_python_api_page_lists_every_public_name() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {"FedspineError", "__version__"}
    assert listed == set(fedspine_edge.__all__)
    assert "`FedspineError`" in text
    assert "`__version__`" in text
