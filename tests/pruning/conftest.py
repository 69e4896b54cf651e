"""Fixtures of the pruning tests."""

from one_thread import one_thread  # noqa: F401
