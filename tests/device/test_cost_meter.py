"""Completion times of each kind, and their continuation after a restart."""

import itertools
import math
import sys
import time

import numpy as np
import pytest

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig, SimulatedSettings, convert
from fedspine_edge.device.cost_meter import CostMeter, emulated_conditions
from fedspine_edge.model.flops import pass_flops
from fedspine_edge.model.layout import Layout
from fedspine_edge.training.peak_memory import PeakMemory


def meter(kind, clock=None):
    return CostMeter(kind, time_factor=2.0, up_mbit_s=8.0, down_mbit_s=16.0, clock=clock or VirtualClock())


def burn(seconds):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_measured_time_is_clock_from_plan_to_report():
    clock = VirtualClock(100.0)
    measured = meter("measured", clock)
    clock.spend(3.5)
    measured.transfer(down_bytes=10**9)
    assert measured.completion_s() == 3.5


def test_modelled_time_is_cpu_time_by_factor_plus_transfer():
    modelled = meter("modelled")
    burn(0.05)  # not inside `working`: does not count
    with modelled.working():
        burn(0.1)
    modelled.transfer(down_bytes=2_000_000, up_bytes=1_000_000)
    assert modelled.completion_s() == pytest.approx(2 * modelled.cpu_s + 1.0 + 1.0)
    assert 0.1 <= modelled.cpu_s < 0.14


def test_simulated_time_depends_on_work_only():
    simulated = meter("simulated")
    with simulated.working():
        burn(0.02)
    simulated.work(SimulatedSettings().flops_per_s)
    assert simulated.completion_s() == 2 * (1.0 + SimulatedSettings().step_s)


@pytest.mark.parametrize("kind", ["measured", "modelled", "simulated"])
def test_cost_meter_continues_after_restart(kind):
    clock = VirtualClock()
    before = meter(kind, clock)
    before.work(1e9)
    before.transfer(up_bytes=5, down_bytes=7)
    with before.working():
        burn(0.01)
    clock.spend(4.0)
    saved, spent = before.to_dict(), before.completion_s()
    clock.spend(1000.0)  # without power
    after = meter(kind, clock)
    after.restore(saved)
    assert after.completion_s() == spent
    assert (after.bytes_up, after.bytes_down) == (5, 7)


def test_flops_follow_layout(tiny_base):
    spec = tiny_base.spec
    full = Layout.full(spec)
    half = Layout(spec, (np.arange(2),) * 2, (np.arange(32),) * 2)
    forward = pass_flops(full, 4, 8, 16, backward=False)
    tokens, weights = 128, 2 * (4 * 32 * 33 - 32 + 64 * (32 + 1 + 32))
    attention = 2 * 4 * tokens * 16 * 32
    adapters = 2 * tokens * 4 * 2 * (4 * 64 + 2 * 96)
    assert forward == 2 * tokens * weights + attention + adapters
    assert pass_flops(half, 4, 8, 16, backward=False) < 0.6 * forward
    step = pass_flops(full, 4, 8, 16, backward=True)
    assert step == 2 * forward + adapters
    assert pass_flops(full, 4, 8, 16, backward=True, scored=True) == step + 16 * weights


@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is restarted through /proc")
def test_peak_memory_counts_since_reset():
    peak = PeakMemory("cpu")
    peak.reset()
    before = peak.read()
    block = np.ones(16_000_000, dtype=np.float64)
    assert peak.read() - before > 0.9 * block.nbytes
    del block
    peak.reset()
    assert peak.read() < before + 64_000_000


def device(**simulated: float) -> DeviceConfig:
    settings = {"device_id": "d", "model": "m", "data": {"path": "x.csv"}, "simulated": simulated}
    return convert(settings, DeviceConfig)


def test_conditions_repeat_and_jitter_keeps_mean() -> None:
    steady, shaky = device(), device(jitter=0.3, link_jitter=0.1)
    assert (emulated_conditions(steady, 5).work, emulated_conditions(steady, 5).link) == (1.0, 1.0)
    drawn = [emulated_conditions(shaky, number) for number in range(1, 2001)]
    assert drawn == [emulated_conditions(shaky, number) for number in range(1, 2001)]
    assert sum(c.work for c in drawn) / len(drawn) == pytest.approx(1.0, abs=0.03)
    assert sum(c.link for c in drawn) / len(drawn) == pytest.approx(1.0, abs=0.01)
    assert max(c.work for c in drawn) > 1.5


def test_drift_starts_at_nominal_speed() -> None:
    factors = [emulated_conditions(device(drift=0.05), number).work for number in range(1, 60)]
    assert factors[0] == 1.0
    steps = [abs(math.log(after / before)) for before, after in itertools.pairwise(factors)]
    assert max(steps) < 0.05 * 4.5
    assert 0 < sum(steps) / len(steps) < 0.08
