"""Every strategy through whole runs, without a server."""

import json
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.bandit.sucb import SUCB
from fedspine_edge.config import BanditSettings, FleetConfig, RewardSettings, TrainingSettings
from fedspine_edge.errors import ConfigError
from fedspine_edge.strategies import DeviceInfo, RoundOutcome, Strategy, create
from fedspine_edge.strategies.registry import BUILT_IN

CLASSES = {"agx": 1.0, "nx": 1.2, "tx2": 1.43}
SCHEDULED = ("fedspine", "fixed", "fedapt")


def config(strategy="fedspine", **values):
    return FleetConfig(strategy=strategy, **{"num_rounds": 6, "pruning_ratio": 0.5, **values})


class Fleet:
    """Devices that follow their assignments; their speed and gain depend on class and arm."""

    def __init__(self, size=6):
        names = list(CLASSES)
        self.devices = [DeviceInfo(f"d{i}", device_class=names[i % 3], num_examples=100) for i in range(size)]

    def outcome(self, device, assignment, status="ok"):
        time_s = CLASSES[device.device_class] * (10 - 6 * assignment.pruning_ratio + assignment.r / 16)
        done = assignment.pruning_ratio if status == "ok" else device.pruning_ratio
        return RoundOutcome(device.device_id, status, time_s, 0.7, 0.65 - assignment.r / 1000, assignment.r / 32, done)

    def round(self, strategy, server_round, status=None):
        """One round; `status` by device id where it is not ok."""
        assignments = strategy.assign(self.devices, server_round)
        outcomes = [
            self.outcome(d, assignments[d.device_id], (status or {}).get(d.device_id, "ok")) for d in self.devices
        ]
        rewards = strategy.observe(outcomes, server_round)
        self.devices = [replace(d, pruning_ratio=o.pruning_ratio) for d, o in zip(self.devices, outcomes)]
        return assignments, rewards


def ratios(strategy, num_rounds, size=6):
    """Per round, the set of assigned pruning ratios."""
    fleet = Fleet(size)
    return [{round(a.pruning_ratio, 6) for a in fleet.round(strategy, t)[0].values()} for t in range(1, num_rounds + 1)]


# -- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("layout", ["consensus", "local"])
def test_every_strategy_runs_to_the_end(name, layout):
    settings = config(name, layout=layout)
    strategy = create(settings)
    assert isinstance(strategy, Strategy)
    fleet = Fleet()
    for server_round in range(1, 7):
        before = {d.device_id: d.pruning_ratio for d in fleet.devices}
        assignments, rewards = fleet.round(strategy, server_round)
        assert set(assignments) == set(before) == set(rewards)
        for device_id, a in assignments.items():
            assert before[device_id] <= a.pruning_ratio <= 0.5
            assert a.r in settings.ranks
            assert 0.0 <= rewards[device_id].total <= 1.0
        if layout == "consensus" and server_round == 1:
            assert {a.pruning_ratio for a in assignments.values()} == {0.0}
    expected = 0.0 if name in ("fedlora", "hetlora") else 0.5
    assert {d.pruning_ratio for d in fleet.devices} == {expected}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("stop_after", ["assign", "observe"])
def test_restored_strategy_makes_the_same_assignments(name, stop_after):
    settings = config(name, num_rounds=8)
    original, fleet = create(settings), Fleet()
    for server_round in range(1, 4):
        fleet.round(original, server_round)
    if stop_after == "assign":
        original.assign(fleet.devices, 4)
    restarted = create(settings)
    restarted.load_dict(json.loads(json.dumps(original.to_dict())))
    other = Fleet()
    other.devices = list(fleet.devices)
    for server_round in range(4, 9):
        assert fleet.round(original, server_round) == other.round(restarted, server_round)
    assert original.to_dict() == restarted.to_dict()


@pytest.mark.parametrize("name", BUILT_IN)
def test_assign_repeated_gives_the_same_assignments(name):
    strategy, fleet = create(config(name)), Fleet()
    fleet.round(strategy, 1)
    first = strategy.assign(fleet.devices, 2)
    assert strategy.assign(fleet.devices, 2) == first
    assert strategy.assign(fleet.devices[::-1], 2) == first


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_strategies_tune_equally_long(name):
    strategy, fleet = create(config(name)), Fleet(1)
    steps = 0
    for server_round in range(1, 7):
        assignment = fleet.round(strategy, server_round)[0]["d0"]
        training = strategy.config.training
        steps += training.tau if assignment.tau is None else assignment.tau
        steps += training.recovery_steps if assignment.recovery_steps is None else assignment.recovery_steps
    assert steps == 6 * 40


@pytest.mark.parametrize("name", BUILT_IN)
def test_assigned_ranks_fit_the_memory(name):
    strategy = create(config(name))
    needs = {4: 400, 8: 800, 16: 1600, 32: 3200}
    small = DeviceInfo("small", memory_bytes=900, memory_by_rank=needs)
    tiny = DeviceInfo("tiny", memory_bytes=100, memory_by_rank=needs)
    silent = DeviceInfo("silent", memory_by_rank=needs)
    for server_round in range(1, 7):
        assignments = strategy.assign([small, tiny, silent], server_round)
        assert assignments["small"].r <= 8
        assert assignments["tiny"].r == 4  # nothing fits: the smallest is tried, and its failure is reported
        strategy.observe([RoundOutcome("small"), RoundOutcome("tiny"), RoundOutcome("silent")], server_round)


@pytest.mark.parametrize("name", BUILT_IN)
def test_rank_that_ran_out_of_memory_is_not_assigned_again(name):
    strategy = create(config(name))
    device = DeviceInfo("d")
    r = strategy.assign([device], 1)["d"].r
    terms = strategy.observe([RoundOutcome("d", "out_of_memory")], 1)["d"]
    assert (terms.total, terms.reason) == (0.0, "ran out of memory")
    assert strategy.assign([device], 2)["d"].r < r or r == 4


@pytest.mark.parametrize("name", BUILT_IN)
def test_state_of_another_strategy_is_rejected(name):
    other = "fixed" if name == "fedspine" else "fedspine"
    with pytest.raises(ConfigError, match=f"saved run used strategy '{other}'"):
        create(config(name)).load_dict(create(config(other)).to_dict())


# -- each of them --------------------------------------------------------------------------------------------------


def test_fedspine_prunes_in_rounds_2_to_4_of_6():
    by_round = ratios(create(config()), 6)
    assert by_round[0] == {0.0}
    assert len(by_round[1]) > 1  # devices differ on the way
    assert by_round[3:] == [{0.5}] * 3


@given(
    num_rounds=st.integers(4, 12),
    target=st.floats(0.0, 0.9),
    layout=st.sampled_from(["consensus", "local"]),
    name=st.sampled_from(SCHEDULED),
)
@settings(max_examples=40, deadline=None)
def test_accepted_target_is_reached_within_steps(num_rounds, target, layout, name):
    chosen = config(name, num_rounds=num_rounds, pruning_ratio=target, layout=layout)
    try:
        strategy = create(chosen)
    except ConfigError:
        pruning_rounds = num_rounds - 2 - (layout == "consensus")
        assert target > 0.25 * pruning_rounds
        return
    fleet = Fleet(3)
    for server_round in range(1, num_rounds + 1):
        before = fmean(d.pruning_ratio for d in fleet.devices)
        fleet.round(strategy, server_round)
        assert fmean(d.pruning_ratio for d in fleet.devices) <= before + 0.25 + 1e-9
        if server_round >= num_rounds - 2:
            assert all(d.pruning_ratio == pytest.approx(target, abs=1e-9) for d in fleet.devices)


def test_too_few_rounds_raise_an_error_with_the_number():
    with pytest.raises(ConfigError, match=r"pruning_ratio 0\.8 cannot be reached in num_rounds = 6") as error:
        create(config(pruning_ratio=0.8))
    assert error.value.remedy == "Use num_rounds >= 7, bandit.max_step >= 0.27 or pruning_ratio <= 0.75."
    create(config(pruning_ratio=0.8, num_rounds=7))
    create(config(pruning_ratio=0.8, layout="local"))
    create(config(pruning_ratio=0.8, bandit=BanditSettings(max_step=0.27)))
    create(config(pruning_ratio=0.75))
    with pytest.raises(ConfigError, match="only tune") as error:
        create(config(num_rounds=3))
    assert error.value.remedy == "Use num_rounds >= 5.", "no step is large enough where no round prunes"
    create(config(num_rounds=5))
    create(config(num_rounds=3, pruning_ratio=0.0))


def test_fleet_mean_target_is_met_while_ratios_differ():
    strategy, fleet = create(config(target="fleet_mean", num_rounds=8)), Fleet()
    for server_round in range(1, 9):
        fleet.round(strategy, server_round)
    final = [d.pruning_ratio for d in fleet.devices]
    assert fmean(final) == pytest.approx(0.5, abs=1e-6)
    assert max(final) - min(final) > 0.01
    assert all(0.35 <= p <= 0.65 for p in final)


def test_rounding_to_whole_groups_keeps_the_target():
    """Devices that achieve a little less than asked still end where the step limit allows it only just."""
    strategy = create(config(num_rounds=5))  # two pruning rounds of 0.25
    ratio = 0.0
    for server_round in range(1, 6):
        asked = strategy.assign([DeviceInfo("d", pruning_ratio=ratio)], server_round)["d"].pruning_ratio
        ratio = max(0.0, asked - 0.01)
        strategy.observe([RoundOutcome("d", pruning_ratio=ratio)], server_round)
    assert asked == 0.5


def test_device_that_lost_its_disk_starts_from_its_ratio():
    strategy, fleet = create(config(num_rounds=9)), Fleet(1)
    for server_round in range(1, 6):
        fleet.round(strategy, server_round)
    assert fleet.devices[0].pruning_ratio > 0.25
    reset = replace(fleet.devices[0], pruning_ratio=0.0)
    assert strategy.assign([reset], 6)["d0"].pruning_ratio <= 0.25


def test_late_joiner_ends_at_its_own_ratio():
    strategy = create(config())
    ratio = 0.0
    for server_round in range(4, 7):
        ratio = strategy.assign([DeviceInfo("late", pruning_ratio=ratio)], server_round)["late"].pruning_ratio
        strategy.observe([RoundOutcome("late", pruning_ratio=ratio)], server_round)
    assert ratio == 0.25


def test_fedspine_learns_nothing_from_lost_devices():
    strategy, fleet = create(config()), Fleet(2)
    _, rewards = fleet.round(strategy, 1, {"d1": "lost"})
    assert rewards["d1"] is None
    assert strategy.explain("d0")["pulls"] == 1
    assert strategy.explain("d1")["pulls"] == 0
    assert "why" in strategy.explain("d0")["last"]
    json.dumps(strategy.explain("d0"))


def test_late_device_gets_a_zero_reward_once():
    strategy, fleet = create(config()), Fleet(2)
    assignments = strategy.assign(fleet.devices, 1)
    outcomes = [fleet.outcome(d, assignments[d.device_id]) for d in fleet.devices]
    outcomes[1] = RoundOutcome("d1", "late")
    rewards = strategy.observe(outcomes, 1)
    assert rewards["d1"].reason == "no report before the deadline"
    assert strategy.observe(outcomes, 1) == {"d0": None, "d1": None}  # observed twice, learned once
    assert strategy.explain("d1")["pulls"] == 1


def test_outcome_of_another_round_or_device_is_ignored():
    strategy, fleet = create(config()), Fleet(1)
    strategy.assign(fleet.devices, 2)
    assert strategy.observe([RoundOutcome("d0"), RoundOutcome("unknown")], 1) == {"d0": None, "unknown": None}


def test_fedspine_moves_to_rewarded_ranks():
    """With I(B_total) as the only reward, and here proportional to the rank, the largest rank pays best."""
    only_lora = RewardSettings(loss=0.0, time=0.0, lora=1.0)
    strategy, fleet = create(config(pruning_ratio=0.0, num_rounds=40, reward=only_lora)), Fleet()
    rounds = [[a.r for a in fleet.round(strategy, t)[0].values()] for t in range(1, 41)]
    assert fmean(r for ranks in rounds[20:] for r in ranks) > 20  # uniform draws: 15
    assert fmean(r == 32 for ranks in rounds[20:] for r in ranks) > 0.4  # uniform draws: 0.25


# -- completion times ------------------------------------------------------------------------------------------------


def run_fleet(arm_choice, num_rounds=16, **values):
    """Per round every device's completion time; and the fleet at the end."""
    settings = BanditSettings(arm_choice=arm_choice)
    strategy, fleet = create(config(num_rounds=num_rounds, bandit=settings, **values)), Fleet(9)
    rounds = []
    for server_round in range(1, num_rounds + 1):
        assignments, _ = fleet.round(strategy, server_round)
        rounds.append(
            {d.device_id: fleet.outcome(d, assignments[d.device_id]).completion_time_s for d in fleet.devices}
        )
    return rounds, fleet


def idle(rounds):
    return fmean(1 - t / max(times.values()) for times in rounds for t in times.values())


def test_paced_arms_finish_sooner_than_uniform_ones():
    paced, uniform = run_fleet("paced")[0], run_fleet("uniform")[0]
    assert idle(paced) < 0.6 * idle(uniform)
    assert sum(max(times.values()) for times in paced) < 0.95 * sum(max(times.values()) for times in uniform)


def test_first_round_uses_one_rank_for_all_devices():
    strategy, fleet = create(config()), Fleet()
    assert {a.r for a in fleet.round(strategy, 1)[0].values()} == {strategy.middle_rank()}
    assert strategy.explain("d0")["pace"] is None
    strategy.assign(fleet.devices, 2)
    times = [strategy.explain(d.device_id)["pace"] for d in fleet.devices]
    slowest = [d.device_class for d, time in zip(fleet.devices, times) if time["sets_the_pace"]]
    assert set(slowest) == {"tx2"}
    assert all(time["predicted_s"] <= time["expected_s"] * 1.001 for time in times)


def test_uniform_arms_are_plain_s_ucb():
    strategy, fleet = create(config(bandit=BanditSettings(arm_choice="uniform"))), Fleet()
    other = SUCB((4, 8, 16, 32))
    for server_round in range(1, 7):
        arms = {
            d.device_id: other.decide(d.device_id, device_class=d.device_class, now=server_round) for d in fleet.devices
        }
        assignments, rewards = fleet.round(strategy, server_round)
        assert {i: (a.u, a.r) for i, a in assignments.items()} == arms
        for device_id, arm in arms.items():
            other.update(device_id, arm, rewards[device_id].total, now=server_round)


def test_fleet_mean_target_shortens_the_rounds():
    equal, _ = run_fleet("paced")
    rounds, fleet = run_fleet("paced", target="fleet_mean")
    final = {d.device_class: d.pruning_ratio for d in fleet.devices}
    assert final["tx2"] > final["nx"] > final["agx"]
    assert fmean(d.pruning_ratio for d in fleet.devices) == pytest.approx(0.5, abs=1e-6)
    assert sum(max(times.values()) for times in rounds) < sum(max(times.values()) for times in equal)


def test_fleet_mean_progress_uses_the_target_of_the_device():
    strategy, fleet = create(config(target="fleet_mean", num_rounds=6)), Fleet(3)
    terms = [fleet.round(strategy, t)[1] for t in range(1, 5)]
    assert {d.pruning_ratio for d in fleet.devices} != {0.5}
    assert {reward.prune for reward in terms[-1].values()} == {1.0}  # each has arrived where it was to end


def test_no_device_is_planned_past_the_deadline():
    strategy, fleet = create(config(num_rounds=12, deadline_s=15.0)), Fleet(3)
    for server_round in range(1, 5):
        fleet.round(strategy, server_round, {"d2": "late"})
    assigned = strategy.assign(fleet.devices, 5)
    times = {d.device_id: strategy.explain(d.device_id)["pace"] for d in fleet.devices}
    assert assigned["d2"].r == 4  # its fastest arm
    assert times["d2"]["sets_the_pace"]
    assert all(times[i]["predicted_s"] <= 0.8 * 15.0 * 1.001 for i in ("d0", "d1"))


def test_state_without_times_is_restored():
    strategy, fleet = create(config()), Fleet()
    fleet.round(strategy, 1)
    older = {k: v for k, v in strategy.to_dict().items() if k not in ("times", "targets", "class_of", "pace")}
    restarted = create(config())
    restarted.load_dict(older)
    fleet.round(restarted, 2)
    fleet.round(restarted, 3)
    assert restarted.assign(fleet.devices, 4)
    assert restarted.explain("d0")["pace"]["predicted_s"] > 0


# -- the baselines -------------------------------------------------------------------------------------------------


def test_fedapt_follows_the_cubic_schedule_with_one_rank():
    strategy = create(config("fedapt", bandit=BanditSettings(max_step=1.0)))
    expected = [0.0, 0.5 * (1 - (2 / 3) ** 3), 0.5 * (1 - (1 / 3) ** 3), 0.5, 0.5, 0.5]
    assert ratios(strategy, 6) == [{round(p, 6)} for p in expected]


def test_fixed_assigns_the_middle_arm():
    fleet, strategy = Fleet(), create(config("fixed"))
    assignments, _ = fleet.round(strategy, 1)
    assert {(a.u, a.r) for a in assignments.values()} == {(0.5, 8)}


def test_hetlora_gives_measured_fast_classes_large_ranks():
    strategy, fleet = create(config("hetlora")), Fleet()
    first, _ = fleet.round(strategy, 1)
    assert {a.r for a in first.values()} == {8}
    second, _ = fleet.round(strategy, 2)
    by_class = {d.device_class: second[d.device_id].r for d in fleet.devices}
    assert by_class == {"agx": 32, "nx": 16, "tx2": 4}
    # Larger ranks take longer; the measurement at equal ranks stays.
    assert {i: a.r for i, a in fleet.round(strategy, 3)[0].items()} == {i: a.r for i, a in second.items()}


def test_prune_then_tune_prunes_in_the_first_possible_round():
    assert ratios(create(config("prune_then_tune")), 6) == [{0.0}] + [{0.5}] * 5
    assert ratios(create(config("prune_then_tune", layout="local")), 6) == [{0.5}] * 6


def test_prune_then_tune_moves_tuning_behind_the_pruning():
    training = TrainingSettings(tau=20, recovery_steps=30)
    strategy, fleet = create(config("prune_then_tune", training=training)), Fleet(1)
    first, second = (fleet.round(strategy, t)[0]["d0"] for t in (1, 2))
    assert (first.tau, first.recovery_steps) == (20, 0)
    assert (second.tau, second.recovery_steps) == (1, 79)


def test_tune_then_prune_prunes_in_the_last_step():
    strategy, fleet = create(config("tune_then_prune")), Fleet(1)
    rounds = [fleet.round(strategy, t)[0]["d0"] for t in range(1, 7)]
    assert [a.pruning_ratio for a in rounds] == [0.0] * 5 + [0.5]
    assert (rounds[5].tau, rounds[5].recovery_steps) == (40, 0)


def test_strategies_name_their_aggregation_rule():
    assert {name: create(config(name)).aggregation for name in BUILT_IN} == {
        "fedspine": "reconstruct",
        "fixed": "reconstruct",
        "fedlora": "zero_pad",
        "hetlora": "zero_pad",
        "fedapt": "reconstruct",
        "prune_then_tune": "reconstruct",
        "tune_then_prune": "reconstruct",
    }
