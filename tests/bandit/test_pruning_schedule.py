"""The pruning schedule: from u to a pruning ratio."""

from statistics import fmean

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedspine_edge.bandit.pruning_schedule import (
    MEAN_SPREAD,
    MIN_INTERVAL,
    PruningSchedule,
    adjust_to_mean,
    rounds_needed,
    spread_by_speed,
)

schedules = st.builds(
    lambda target, spare, max_step, start: PruningSchedule(
        target, start + rounds_needed(target, max_step) + spare, max_step, start
    ),
    target=st.floats(0.01, 0.95),
    spare=st.integers(0, 10),
    max_step=st.floats(0.05, 1.0),
    start=st.integers(0, 1),
)


@given(schedule=schedules, data=st.data())
def test_schedule_is_monotone_and_ends_at_the_target(schedule, data):
    previous = 0.0
    for server_round in range(1, schedule.last_pruning_round + 3):
        u = data.draw(st.floats(0, 1))
        p = schedule.ratio(u, server_round=server_round, previous=previous)
        assert previous <= p <= previous + schedule.max_step + 1e-12
        if not schedule.prunes_in(server_round):
            assert p == previous
        previous = p
    assert previous == pytest.approx(schedule.target, abs=1e-9)


@given(schedule=schedules, previous=st.floats(0, 0.9), u=st.floats(0, 1), v=st.floats(0, 1))
def test_larger_u_never_prunes_less(schedule, previous, u, v):
    for server_round in range(1, schedule.last_pruning_round + 1):
        low, high = (schedule.ratio(x, server_round=server_round, previous=previous) for x in sorted((u, v)))
        assert previous <= low <= high


def test_schedule_without_step_limit_follows_the_formula():
    schedule = PruningSchedule(0.5, 8, 1.0)
    for t in range(1, 9):
        lo, hi = 0.5 * (t / 8) ** 3, 0.5 * (1 - (1 - t / 8) ** 3)
        # max_step 1 never binds, P - max_step (T - t) is only above lo in the last round, where both are P
        assert schedule.bounds(t) == (pytest.approx(lo), pytest.approx(hi))
        assert schedule.ratio(0.3, server_round=t, previous=0.0) == pytest.approx(lo + 0.3 * (hi - lo))


def test_slow_start_is_raised_to_reach_the_target():
    """P = 0.5 in three pruning rounds: lo would be 0.02, 0.15, 0.5, whose last step is too large for 0.25."""
    schedule = PruningSchedule(0.5, 4, 0.25, start=1)
    previous, path = 0.0, []
    for t in range(1, 7):
        previous = schedule.ratio(0.0, server_round=t, previous=previous)
        path.append(previous)
    assert path == [0.0, pytest.approx(0.5 / 27), 0.25, 0.5, 0.5, 0.5]


def test_late_joiner_is_limited_by_its_steps():
    schedule = PruningSchedule(0.5, 8, 0.25)
    assert schedule.ratio(1.0, server_round=8, previous=0.0) == 0.25
    assert schedule.ratio(1.0, server_round=9, previous=0.25) == 0.25


def test_unreachable_target_raises_value_error():
    with pytest.raises(ValueError, match=r"0.8 in steps of 0.25 needs 4 pruning rounds, not 3"):
        PruningSchedule(0.8, 4, 0.25, start=1)


@pytest.mark.parametrize(("target", "step", "rounds"), [(0.5, 0.25, 2), (0.51, 0.25, 3), (0.0, 0.25, 0), (0.3, 0.1, 3)])
def test_rounds_needed(target, step, rounds):
    assert rounds_needed(target, step) == rounds


@given(
    us=st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=8),
    target=st.floats(0.05, 0.9),
)
def test_mean_target_is_met_while_ratios_differ(us, target):
    schedule = PruningSchedule(target, 6, 0.25, spread=MEAN_SPREAD)
    previous = {f"d{i}": 0.0 for i in range(len(us))}
    for t in range(1, 7):
        limits = {i: schedule.limits(server_round=t, previous=p) for i, p in previous.items()}
        previous = {i: schedule.ratio(u[t - 1], server_round=t, previous=p) for (i, p), u in zip(previous.items(), us)}
    adjusted = adjust_to_mean(previous, limits, target)
    assert sum(adjusted.values()) / len(adjusted) == pytest.approx(target, abs=1e-6)
    assert all(abs(p - target) <= MEAN_SPREAD + 1e-9 and 0 <= p < 1 for p in adjusted.values())


@given(ratios=st.lists(st.floats(0, 0.9), min_size=2, max_size=8), mean=st.floats(0, 1))
def test_adjust_to_mean_does_not_depend_on_the_order(ratios, mean):
    assume(len(set(ratios)) > 1)
    named = {f"d{i}": p for i, p in enumerate(ratios)}
    limits = {name: (p / 2, (1 + p) / 2) for name, p in named.items()}
    reverse = dict(reversed(named.items()))
    adjusted = adjust_to_mean(named, limits, mean)
    assert adjusted == adjust_to_mean(reverse, limits, mean)
    assert all(limits[name][0] <= p <= limits[name][1] for name, p in adjusted.items())


@given(
    server_round=st.integers(1, 10),
    previous=st.floats(0, 0.6),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
@settings(max_examples=150, deadline=None)
def test_places_invert_ratios(server_round, previous, part):
    schedule = PruningSchedule(target=0.6, last_pruning_round=8, max_step=0.25, start=1)
    first, last = schedule.limits(server_round=server_round, previous=previous)
    wanted = tuple(first + share * (last - first) for share in part)
    begin, end = schedule.places(wanted, server_round=server_round, previous=previous)
    assert 0.0 <= begin < end <= 1.0
    got = [schedule.ratio(u, server_round=server_round, previous=previous) for u in (begin, end)]
    if last - first > 1e-6:  # an interval of u is never narrower than MIN_INTERVAL
        lo, hi = schedule.bounds(server_round)
        assert got == pytest.approx(wanted, abs=MIN_INTERVAL * (hi - lo) + 1e-6)


@given(
    speeds=st.lists(st.floats(0, 3), min_size=1, max_size=9),
    target=st.floats(0.1, 0.8),
    slope=st.floats(0.0, 2.0),
)
@settings(max_examples=100, deadline=None)
def test_spread_by_speed_prunes_slow_devices_more(speeds, target, slope):
    schedule = PruningSchedule(target=target, last_pruning_round=8, max_step=0.25, spread=0.15)
    full = {f"d{i}": speed for i, speed in enumerate(speeds)}
    found = spread_by_speed(full, dict.fromkeys(full, slope), schedule)
    assert fmean(found.values()) == pytest.approx(target, abs=1e-6)
    by_speed = [found[i] for i in sorted(full, key=lambda i: full[i])]
    assert by_speed == pytest.approx(sorted(by_speed), abs=1e-9)
    assert all(abs(p - target) <= schedule.spread + 1e-9 for p in found.values())


def test_spread_by_speed_of_equal_devices_is_the_target():
    schedule = PruningSchedule(target=0.5, last_pruning_round=8, max_step=0.25, spread=0.15)
    assert spread_by_speed({"a": 1.0, "b": 1.0}, {"a": 0.7, "b": 0.7}, schedule) == pytest.approx({"a": 0.5, "b": 0.5})
    found = spread_by_speed({"a": 1.0, "b": 2.0}, {"a": 0.7, "b": 0.7}, schedule)
    assert found == pytest.approx({"a": 0.35, "b": 0.65})
