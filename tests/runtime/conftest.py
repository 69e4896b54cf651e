"""Fixtures of the runtime tests."""

from bundle_fixtures import *  # noqa: F403
from one_thread import one_thread  # noqa: F401
