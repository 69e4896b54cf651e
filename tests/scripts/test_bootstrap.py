"""scripts/bootstrap on a machine with missing tools: one line names the tool, one the apt command to install it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap"
TOOLS = ("bash", "dirname", "env", "id", "find", "sort", "xargs", "cat", "sha256sum", "grep", "timeout", "uname", "rm")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Return a folder with common tools but neither Python nor a compiler, and a copy of the scripts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    project = tmp_path / "project" / "scripts"
    project.mkdir(parents=True)
    shutil.copy(BOOTSTRAP, project)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def bootstrap(machine: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "project" / "scripts" / "bootstrap"],
        env={"PATH": str(machine / "bin"), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(machine: Path) -> str:
    done = bootstrap(machine)
    assert done.returncode == 2, done.stderr
    assert not (machine / "project" / ".venv").exists()
    return done.stderr


def test_missing_python_is_named(machine: Path) -> None:
    message = refused(machine)
    assert "no python3 found" in message
    assert "sudo apt install python3 python3-venv python3-dev" in message


def test_old_python_is_named(machine: Path) -> None:
    script(machine / "bin" / "python3", 'if [ "$1" = -V ]; then echo Python 3.9.2; else exit 1; fi')
    assert "is Python 3.9.2; Python >= 3.10 is needed" in refused(machine)


def test_missing_venv_module_is_named(machine: Path) -> None:
    # as on a bare Debian, where python3 comes without ensurepip
    script(
        machine / "bin" / "python3",
        f'case "$2" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac',
    )
    message = refused(machine)
    assert "has no venv module" in message
    assert "sudo apt install python3-venv" in message


def test_missing_compiler_is_named(machine: Path) -> None:
    (machine / "bin" / "python3").symlink_to(sys.executable)
    message = refused(machine)
    assert "no C++ compiler found" in message
    assert "sudo apt install g++" in message
