"""Version of the package; CMake and pyproject.toml hold the same."""

__version__ = "0.1.0"
