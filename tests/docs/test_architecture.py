"""Checks the architecture picture and page against the import contracts and the folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fedspine_edge"


def test_architecture_picture_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "draw_architecture"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_architecture_page_lists_every_folder() -> None:
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("## Folders, in that order")[1].split("\n## ")[0]
    listed = {
        name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= listed
    assert {name for name in listed if not (PACKAGE / name).exists()} == set()
    for folder, first in re.findall(r"^\| `(\w+)` \| .* \| `([\w.]+)` \|$", table, re.MULTILINE):
        assert (PACKAGE / folder / first).is_file(), (folder, first)


def test_architecture_page_names_existing_files() -> None:
    page = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("## Where to find")[1].split("\n## ")[0]
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert files
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
