"""The public API: what `fedspine_edge` exports, that it is light to import, and that docs and examples use it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedspine_edge
from fedspine_edge.errors import MissingDependency

ROOT = Path(__file__).resolve().parents[2]
PUBLIC_MODULES = {"fedspine_edge", "fedspine_edge.data", "fedspine_edge.errors", "fedspine_edge.strategies"}
"""Modules that docs and examples may import from."""


def test_public_names_are_pinned() -> None:
    expected = """
        Assignment BaseStrategy BrokerSettings ColumnNames DataSettings DeviceClass DeviceConfig EdgeTuner
        EmbeddedBroker Example FedspineError FleetConfig FleetDevice FleetServer GroupScores ImportanceTracker
        MemorySettings MqttTransport OptimizationProfile PruningSettings Session __version__ compile_engine load_base
        load_config load_model load_tokenizer save_model select_layout
    """
    assert sorted(fedspine_edge.__all__) == expected.split()
    assert set(fedspine_edge._LAZY) | {"FedspineError", "__version__"} == set(fedspine_edge.__all__)


@pytest.mark.parametrize("name", fedspine_edge.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(fedspine_edge, name) is not None


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Edgetuner'"):
        fedspine_edge.Edgetuner  # noqa: B018


def test_import_loads_no_dependency() -> None:
    code = "import sys; before = set(sys.modules); import fedspine_edge; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "numpy", "msgspec", "paho", "transformers"} & set(done.stdout.split())


def test_docs_and_examples_import_public_modules_only() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    pages = [page for page in pages if "decisions" not in page.parts]
    used = {
        (module, page.name)
        for page in pages
        for module in re.findall(r"^ *(?:from|import) (fedspine_edge[\w.]*)", page.read_text(encoding="utf-8"), re.M)
    }
    assert used
    assert {(module, page) for module, page in used if module not in PUBLIC_MODULES} == set()


def test_missing_dependency_names_all_packages_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "transformers", "psutil"):
        monkeypatch.setitem(sys.modules, module, None)
    error = MissingDependency.from_import(ModuleNotFoundError(name="torch.nn"), purpose="EdgeTuner")
    assert error.message == "EdgeTuner needs the packages 'torch', 'transformers', 'psutil', which are not installed."
    assert error.remedy == "Install with: pip install 'fedspine-edge[device]'"
    with pytest.raises(ModuleNotFoundError, match="mine"):
        MissingDependency.from_import(ModuleNotFoundError("mine", name="mine"), purpose="EdgeTuner")
