"""The completion-time model, and the arms that are feasible for an expected time."""

import json
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.bandit.time_model import PRIOR_SLOPES, CompletionTimeModel, DeviceSpeed, FeasibleArms, _ridge, _Sums

RANKS = (4, 8, 16, 32)


def truth(speed, kept, r):
    """A device's time: a fixed part, one that shrinks with the model, one for the rank's bytes. Not log-linear."""
    return speed * (2.0 + 8.0 * kept) + 0.05 * r


def learned(speeds, rounds=10, jitter=0.0, seed=0):
    """A model that saw `rounds` rounds of shrinking models at drawn ranks; device id → class is its first letter."""
    model, rng = CompletionTimeModel(32), random.Random(seed)
    for now in range(1, rounds + 1):
        for device_id, speed in speeds.items():
            r, kept = rng.choice(RANKS), 1.0 - 0.05 * now
            took = truth(speed, kept, r) * math.exp(rng.gauss(0.0, jitter))
            model.observe(device_id, device_id[0], kept=kept, r=r, time_s=took, now=now)
    return model


def predict(model, device_id, kept, r):
    return math.exp(model.speeds({device_id: device_id[0]})[device_id].log_time(kept, r / 32))


# -- times -----------------------------------------------------------------------------------------------------------


def test_time_of_a_known_device_is_predicted():
    speeds = {"a1": 1.0, "a2": 1.3, "b1": 4.0}
    model = learned(speeds)
    for device_id, speed in speeds.items():
        for r in RANKS:
            assert predict(model, device_id, 0.45, r) == pytest.approx(truth(speed, 0.45, r), rel=0.06)


def test_prediction_averages_noise_out():
    model = learned({"a1": 1.0, "a2": 1.0, "a3": 1.0}, rounds=14, jitter=0.1, seed=3)
    assert predict(model, "a1", 0.3, 8) == pytest.approx(truth(1.0, 0.3, 8), rel=0.12)


def test_prediction_follows_a_device_that_becomes_slower():
    model = learned({"a1": 1.0})
    for now in range(11, 31):
        model.observe("a1", "a", kept=0.5, r=8, time_s=2 * truth(1.0, 0.5, 8), now=now)
    assert predict(model, "a1", 0.5, 8) == pytest.approx(2 * truth(1.0, 0.5, 8), rel=0.1)


def test_new_device_is_predicted_from_its_class_or_fleet():
    model = learned({"a1": 1.0, "a2": 1.0, "b1": 4.0})
    assert predict(model, "a9", 0.5, 8) == pytest.approx(predict(model, "a1", 0.5, 8), rel=0.02)
    assert predict(model, "a1", 0.5, 8) < predict(model, "z1", 0.5, 8) < predict(model, "b1", 0.5, 8)


def test_single_round_is_extrapolated_by_the_prior():
    model = CompletionTimeModel(32)
    model.observe("a1", "a", kept=1.0, r=8, time_s=10.0, now=1)
    assert model.speeds({"a1": "a"})["a1"].slopes == pytest.approx(PRIOR_SLOPES)
    assert predict(model, "a1", 1.0, 8) == pytest.approx(10.0)


def test_model_without_times_predicts_nothing():
    model = CompletionTimeModel(32)
    model.observe("a1", "a", kept=1.0, r=8, time_s=0.0, now=1)
    assert model.speeds({"a1": "a"}) == {}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.sampled_from(RANKS), st.floats(1e-3, 1e4)), max_size=25
    )
)
@settings(max_examples=60, deadline=None)
def test_more_work_is_never_predicted_to_be_faster(rows):
    model = CompletionTimeModel(32)
    for now, (device_id, kept, r, time_s) in enumerate(rows, start=1):
        model.observe(device_id, "one", kept=kept, r=r, time_s=time_s, now=now)
    classes = {device_id: "one" for device_id, *_ in rows}
    for speed in model.speeds(classes).values():
        assert all(math.isfinite(x) and x >= 0 for x in speed.slopes)
        assert math.isfinite(speed.level)
    restored = CompletionTimeModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert restored.speeds(classes) == model.speeds(classes)


@given(rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-2, 2)), min_size=2, max_size=12))
@settings(max_examples=150, deadline=None)
def test_slopes_are_the_best_non_negative_fit(rows):
    sums = _Sums()
    for x1, x2, y in rows:
        sums.add(x1, x2, y, 1, 1.0)
    means = [math.fsum(column) / len(rows) for column in zip(*rows)]

    def cost(slopes):
        ridge = 0.1 * sum((s - g) ** 2 for s, g in zip(slopes, PRIOR_SLOPES))
        around = [(x1 - means[0], x2 - means[1], y - means[2]) for x1, x2, y in rows]
        return ridge + math.fsum((y - slopes[0] * x1 - slopes[1] * x2) ** 2 for x1, x2, y in around)

    found = cost(_ridge(sums.spread(), PRIOR_SLOPES, 0.1))
    assert all(found <= cost((i / 20, 0.0)) + 1e-9 and found <= cost((0.0, i / 20)) + 1e-9 for i in range(80))


def test_predictions_for_10_000_devices_take_a_second():
    model = CompletionTimeModel(32)
    for i in range(10_000):
        for now in (1, 2):
            model.observe(f"d{i}", f"c{i % 9}", kept=1.0 / now, r=RANKS[(i + now) % 4], time_s=5.0 + i % 7, now=now)
    began = time.perf_counter()
    model.speeds({f"d{i}": f"c{i % 9}" for i in range(10_000)})
    assert time.perf_counter() - began < 3.0  # measured: 0.15 s on one core
    for i in range(100):
        for now in range(3, 200):
            model.observe(f"d{i}", f"c{i % 9}", kept=1.0 / now, r=8, time_s=5.0, now=now)
    assert len(json.dumps(model.to_dict())) < 250 * 10_000  # sums, whatever the number of rounds


# -- feasible arms ----------------------------------------------------------------------------------------------------


def make_arms(level, *, limits=(0.2, 0.6), ranks=RANKS, slopes=(0.8, 0.4)):
    return FeasibleArms(DeviceSpeed(level, slopes), limits, (1 - limits[0], 1 - limits[1]), ranks, 32)


def log_time(found, ratio, r):
    return found.speed.log_time(1 - ratio, r / 32)


@given(
    level=st.floats(-1, 3),
    others=st.floats(-1, 3),
    tolerance=st.floats(0.01, 0.2),
    limits=st.tuples(st.floats(0, 0.6), st.floats(0, 0.3)).map(lambda x: (x[0], x[0] + x[1])),
    ranks=st.sampled_from([(4,), (4, 8, 16, 32), (8, 32)]),
)
@settings(max_examples=150, deadline=None)
def test_feasible_arms_take_close_to_the_expected_time(level, others, tolerance, limits, ranks):
    arms = make_arms(level, limits=limits, ranks=ranks)
    expected = max(arms.shortest, make_arms(others).shortest)
    feasible = arms.within(expected, tolerance)
    assert feasible
    longest_below = max(min(expected, arms.log_times(r)[0]) for r in ranks if arms.log_times(r)[1] <= expected + 1e-12)
    for r, (first, last) in feasible.items():
        assert limits[0] - 1e-9 <= first <= last <= limits[1] + 1e-9
        for ratio in (first, (first + last) / 2, last):
            assert log_time(arms, ratio, r) <= expected + 1e-6
            assert log_time(arms, ratio, r) >= longest_below - tolerance - 1e-6


def test_slowest_device_prunes_most_at_the_smallest_rank():
    arms = make_arms(2.0)
    feasible = arms.within(arms.shortest, 0.04)
    assert feasible == {4: (pytest.approx(0.6), pytest.approx(0.6))}  # nothing that takes longer is feasible


def test_fast_device_prunes_least_at_the_largest_rank():
    feasible = make_arms(0.0).within(2.0, 0.05)
    assert set(feasible) == {32}
    assert feasible[32][0] == pytest.approx(0.2)


def test_larger_rank_needs_a_larger_ratio():
    feasible = make_arms(1.0).within(1.0 + 0.8 * 0.6 + 0.4 * 0.3, 0.03)
    assert len(feasible) >= 2
    least = [feasible[r][0] for r in sorted(feasible)]
    assert least == sorted(least)
