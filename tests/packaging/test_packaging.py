"""Source distribution and wheel: complete, not linked against torch, and usable on a server without it."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*argv: object, **environment: str) -> str:
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, timeout=280, env={**os.environ, **environment}, cwd="/"
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a source distribution, and of a wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, FEDSPINE_CUDA="OFF")
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_sdist_contains_sources_and_licence_only(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CMakeLists.txt", "csrc/bindings.cpp", "fedspine_edge/__init__.py"} <= names
    assert not [name for name in names if re.search(r"\.(so|pyc|onnx|safetensors)$|^\.venv/|^build/", name)]


def test_wheel_contains_extension_not_linked_to_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        extension = next(name for name in names if re.fullmatch(r"fedspine_edge/_C\..*\.so", name))
        archive.extract(extension, tmp_path)
    assert {"fedspine_edge/py.typed", "fedspine_edge/monitoring/report.html.j2"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    needed = re.findall(r"NEEDED.*\[(.*)\]", call("readelf", "-d", tmp_path / extension))
    assert needed
    assert not [library for library in needed if "torch" in library or "c10" in library or "cuda" in library]


def test_server_installs_and_runs_without_torch(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", wheel)
    installed = call(python, "-m", "pip", "list", "--format=freeze").lower()
    assert "torch" not in installed
    assert "transformers" not in installed
    config = tmp_path / "fleet.toml"
    config.write_text(f"run_dir = '{tmp_path / 'run'}'\n[broker]\nport = 1\n")
    tool = tmp_path / "venv" / "bin" / "fedspine-edge"
    assert "demo" in call(tool, "--help")
    refused = subprocess.run([tool, "server", "--config", config], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2  # it tried to connect to the broker
    assert "127.0.0.1:1" in refused.stderr
    missing = subprocess.run(
        [tool, "tune", "--model", "m", "--data", "d", "--out", "o"], capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert "pip install 'fedspine-edge[device]'" in missing.stderr
