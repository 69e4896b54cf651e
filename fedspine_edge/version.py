"""Version of the package, the same as in CMakeLists.txt and pyproject.toml."""

__version__ = "0.1.0"
