"""Fixtures of the tuner tests."""

from device_fixtures import *  # noqa: F403
from one_thread import one_thread  # noqa: F401
