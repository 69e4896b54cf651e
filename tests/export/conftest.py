"""Fixtures of the export tests."""

from bundle_fixtures import *  # noqa: F403
from one_thread import one_thread  # noqa: F401
