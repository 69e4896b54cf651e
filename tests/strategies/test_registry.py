"""Creation of the strategy that the setting `strategy` names."""

import subprocess
import sys

import pytest

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError
from fedspine_edge.strategies import create
from fedspine_edge.strategies.fedlora import FedLoRA


def make(strategy):
    return create(FleetConfig(strategy=strategy))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module of the user's and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        name = f"users_{abs(hash((source, str(tmp_path)))):x}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_create_loads_a_custom_strategy(user_module):
    module = user_module(
        "from fedspine_edge.strategies.fedlora import FedLoRA\nclass Mine(FedLoRA):\n    name = 'mine'\n"
    )
    strategy = make(f"{module}:Mine")
    assert isinstance(strategy, FedLoRA)
    assert strategy.to_dict()["strategy"] == "mine"


def test_unknown_name_suggests_the_closest():
    with pytest.raises(ConfigError, match="'fedspin' is not known") as error:
        make("fedspin")
    assert error.value.remedy == "Did you mean 'fedspine'?"


def test_unknown_name_without_a_close_match_lists_all():
    with pytest.raises(ConfigError) as error:
        make("zzz")
    assert "tune_then_prune" in error.value.remedy


@pytest.mark.parametrize("path", [":", "mod:", ":Attr"])
def test_incomplete_path_raises_config_error(path):
    with pytest.raises(ConfigError, match="not of the form 'module:attribute'"):
        make(path)


def test_missing_module_raises_config_error():
    with pytest.raises(ConfigError, match="module 'no_such_module' could not be imported") as error:
        make("no_such_module:Mine")
    assert "PYTHONPATH" in error.value.remedy


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("import no_such_dependency", "Mine", "No module named 'no_such_dependency'"),
        ("1 / 0", "Mine", "ZeroDivisionError"),
        ("class Other: pass", "Mine", "has no attribute 'Mine'"),
        ("Mine = 3", "Mine", "is a int and cannot be called"),
        ("class Mine:\n    def __init__(self): pass", "Mine", "could not be created: TypeError"),
        ("def Mine(config): raise RuntimeError('no luck')", "Mine", "could not be created: RuntimeError: no luck"),
        ("class Mine:\n    def __init__(self, config): self.aggregation = 'svd'", "Mine", "lacks: assign, observe"),
    ],
)
def test_invalid_custom_strategy_is_described(user_module, source, attribute, message):
    with pytest.raises(ConfigError, match=message):
        make(f"{user_module(source)}:{attribute}")


def test_strategies_are_imported_lazily_without_torch():
    code = (
        "import sys\nfrom fedspine_edge.strategies import create\n"
        "from fedspine_edge.config import FleetConfig\n"
        "create(FleetConfig())\n"
        "assert 'fedspine_edge.strategies.hetlora' not in sys.modules\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
