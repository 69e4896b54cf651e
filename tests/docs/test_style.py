"""The package's docstrings, comments and messages follow STYLE.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "fedspine_edge").rglob("*.py"))
FRAGMENTS = ("What ", "Which ", "Where ", "Who ", "How ", "From ", "Of ")
METAPHORS = re.compile(
    r"\b(told|anew|rehears\w*|mend|mends|mended|ours|theirs|heard|twins?|goes on|nobody's|ballots?)\b"
)
LONGEST = 800


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences_and_not_fragments(path: Path) -> None:
    found = [f"{line}: {text.splitlines()[0]}" for line, text in docstrings(path) if text.startswith(FRAGMENTS)]
    assert not found, found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_hold_no_word_that_the_style_guide_replaces(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if METAPHORS.search(line)]
    assert not found, found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_at_most_800_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
