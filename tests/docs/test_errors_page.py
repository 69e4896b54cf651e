"""Checks docs/reference/errors.md: each listed message is in the package, and the tree is that of errors.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fedspine_edge import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")


def messages() -> set[str]:
    """Return every string of the package's source, with `…` in the place of formatted values."""
    found = set()
    for path in (ROOT / "fedspine_edge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_errors_page_lists_messages_that_the_package_has() -> None:
    cells = [row.split(" | ")[0].removeprefix("| ") for row in PAGE.splitlines() if row.startswith("| `")]
    listed = [re.sub(r"^`+ ?| ?`+$", "", cell).replace("\\|", "|") for cell in cells]
    assert len(listed) > 50
    known = messages()
    assert [message for message in listed if message not in known] == []


def test_errors_page_shows_every_error_class() -> None:
    tree = re.search(r"```\n(FedspineError\n.*?)```", PAGE, re.DOTALL)
    assert tree
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(re.findall(r"[A-Z]\w+(?=\s{2,}|\n)", tree[1])) == classes
