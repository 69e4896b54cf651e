"""Whole runs of the server against devices that speak the real protocol, in virtual time."""

from __future__ import annotations

import itertools
import json
import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fleet_fakes import SPEC, Fleet, make_config, make_spec

from fedspine_edge.errors import ConfigError, FedspineError
from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import Report, RoundPlan, WaitPlan
from fedspine_edge.protocol.topics import UploadTopic
from fedspine_edge.server.journal.writer import Journal


def views(config, number=None):
    with Journal.open_readonly(config.run_dir) as journal:
        return journal.device_rounds(number)


def statuses(config, number):
    return {view.device_id: view.status for view in views(config, number)}


def test_run_ends_with_nested_layouts_and_final_folder(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    result = fleet.serve(config)
    assert result.num_rounds == 5
    final = Path(result.final_dir)
    data = (final / "adapter.safetensors").read_bytes()
    assert codec.digest(data) == result.adapter_sha256
    tensors = codec.unpack(data)
    assert tensors["layers.0.q.lora_A"].shape == (4, 8)
    assert tensors["layers.1.down.lora_B"].shape == (8, 4)
    assert tensors["head.out.weight"].shape == (2, 8)
    assert not any(name.startswith("order") for name in tensors)
    layout_json = json.loads((final / "layout.json").read_text())
    layout = Layout.from_dict(SPEC, layout_json)
    assert layout_json["scaling"] == 2.0
    assert (layout_json["trained_examples"], layout_json["trained_steps"]) == (100 + 150 + 200, 5 * (4 + 2))
    assert layout_json["r"] == 4
    assert msgspec.convert(layout_json["spec"], type(SPEC)) == SPEC
    assert result.pruning_ratio == pytest.approx(layout.pruning_ratio)
    assert abs(layout.pruning_ratio - 0.5) < 0.1
    # Consensus: all devices keep prefixes of one order, so each holds the fleet's layout.
    for device in fleet.devices.values():
        assert layout.is_within(device.layout)
    kept = sorted((d.layout for d in fleet.devices.values()), key=lambda x: x.pruning_ratio)
    assert all(small.is_within(large) for large, small in itertools.pairwise(kept))
    # Rows that nobody holds any more are dropped.
    gone = np.setdiff1d(np.arange(32), np.concatenate([d.layout.channels[0] for d in fleet.devices.values()]))
    assert gone.size > 0
    assert not tensors["layers.0.up.lora_B"][gone].any()


def test_local_layouts_end_with_the_most_trained_groups(fleet, tmp_path):
    config = make_config(tmp_path / "run", layout="local")
    fleet.add_three()
    result = fleet.serve(config)
    layout_json = json.loads((Path(result.final_dir) / "layout.json").read_text())
    run = json.loads((Path(result.final_dir) / "run.json").read_text())
    for device in fleet.devices.values():
        assert Layout.from_dict(SPEC, run["devices"][device.device_id]["layout"]).to_dict() == device.layout.to_dict()
    held = np.zeros(32)
    for device in fleet.devices.values():
        held[device.layout.channels[0]] += device.num_examples
    chosen = layout_json["channels"][0]
    others = np.setdiff1d(np.arange(32), chosen)
    assert held[chosen].min() >= held[others].max()
    assert abs(result.pruning_ratio - 0.5) < 0.1


def test_run_repeated_gives_the_same_adapter(tmp_path):
    results = []
    for name in ("one", "two"):
        folder = tmp_path / name
        (folder / "devices").mkdir(parents=True)
        fleet = Fleet(folder / "devices")
        fleet.add_three()
        results.append(fleet.serve(make_config(folder / "run")))
    assert results[0].adapter_sha256 == results[1].adapter_sha256
    assert results[0].run_id == results[1].run_id
    (tmp_path / "other").mkdir()
    fleet = Fleet(tmp_path / "other")
    fleet.add_three()
    assert fleet.serve(make_config(tmp_path / "run", seed=1)).adapter_sha256 != results[0].adapter_sha256


def test_silent_device_is_late_and_disconnected_one_is_lost(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1)
    fleet.add_three()
    fleet.devices["d1"].silent = lambda plan: plan.server_round == 2

    def vanish(plan):
        if plan.server_round == 2:
            fleet.devices["d2"].publish_status("offline")
        return plan.server_round == 2

    fleet.devices["d2"].silent = vanish
    fleet.serve(config)
    rows = {view.device_id: view for view in views(config, 2)}
    assert (rows["d0"].status, rows["d1"].status, rows["d2"].status) == ("ok", "late", "lost")
    assert rows["d1"].reward == 0.0
    assert rows["d2"].reward is None
    assert rows["d2"].restarts == 1
    with Journal.open_readonly(config.run_dir) as journal:
        second = journal.rounds()[1]
    assert second.ended_wall_s - second.started_wall_s == pytest.approx(config.deadline_s, abs=1.0)
    # d2 never came back, so it is given no more plans; d1 goes on.
    assert statuses(config, 3) == {"d0": "ok", "d1": "ok"}


def test_device_that_reconnects_in_time_is_accepted(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()

    def blink(plan, tensors, report):
        if plan.server_round == 2:
            fleet.devices["d1"].publish_status("offline")
        return tensors, report

    fleet.devices["d1"].mutate = blink
    fleet.serve(config)
    row = next(view for view in views(config, 2) if view.device_id == "d1")
    assert (row.status, row.restarts) == ("ok", 1)
    assert statuses(config, 3)["d1"] == "ok"


def test_device_that_joins_late_takes_part_in_the_next_round(fleet, tmp_path):
    config = make_config(tmp_path / "run", num_rounds=6, bandit={"max_step": 0.5})
    fleet.add_three()
    late = fleet.add("late", start=False)

    def opened(name, data):
        if name == "round_opened" and data["server_round"] == 2:
            late.clock.advance_to(fleet.clock.now() + 1.0)
            late.start()

    result = fleet.serve(config, on_event=opened)
    assert "late" not in statuses(config, 2)
    assert {n: statuses(config, n)["late"] for n in (3, 4, 5, 6)} == dict.fromkeys((3, 4, 5, 6), "ok")
    assert result.num_devices == 4


def test_device_offline_at_round_start_gets_a_wait_plan(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    away = fleet.devices["d2"]
    away.silent = lambda plan: plan.server_round == 2

    def go(name, data):
        if name == "round_opened" and data["server_round"] == 2:
            away.publish_status("offline")

    fleet.serve(config, on_event=go)
    plans = [(plan.server_round, type(plan)) for plan in away.plans]
    assert (3, WaitPlan) in plans
    assert (3, RoundPlan) not in plans


def test_devices_of_an_earlier_run_get_wait_plans(fleet, tmp_path):
    """Else the end of that run, which the broker keeps for them, sends them home again whenever they start."""
    for name in ("d0", "d1", "d2"):
        device = fleet.add(name, start=False)
        handle, status, started = device.handle, device.status, []

        def start_after_wait(event, device=device, handle=handle, started=started):
            handle(event)
            if not started and device.plans and isinstance(device.plans[-1], WaitPlan):
                started.append(True)
                device.publish_status()

        def offline_before(state, status=status, started=started):
            return status(state if started else "offline")

        device.handle, device.status = start_after_wait, offline_before
        device.start()
    result = fleet.serve(make_config(tmp_path / "run"))
    assert result.num_devices == 3
    assert {type(device.plans[0]) for device in fleet.devices.values()} == {WaitPlan}


def test_repeated_and_foreign_reports_change_nothing(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    old: dict[int, Report] = {}
    device = fleet.devices["d0"]

    def remember(plan, tensors, report):
        old[plan.server_round] = report
        return tensors, report

    device.mutate = remember

    def replay(name, data):
        if name == "round_opened" and data["server_round"] == 3:
            device.clock.advance_to(fleet.clock.now())
            for changes in ({}, {"run_id": "another"}, {"plan_sha256": "0" * 64}, {"loss_after": 0.0}):
                report = msgspec.structs.replace(old[2], **changes)
                device.transport.publish(device.topics.report("d0"), codec.encode(report))
            stolen = msgspec.structs.replace(old[2], device_id="d1")
            device.transport.publish(device.topics.report("d0"), codec.encode(stolen))

    fleet.serve(config, on_event=replay)
    answers = [(ack.run_id == "another", ack.status) for ack in device.acks if ack.server_round == 2]
    # The original and its repetitions (changed or not) get the recorded answer; the others are refused.
    assert sorted(answers) == [(False, "accepted"), (False, "accepted"), (False, "accepted"), (False, "refused"),
                               (True, "refused")]  # fmt: skip
    assert [view.loss_after for view in views(config, 2) if view.device_id == "d0"] == [pytest.approx(0.6)]
    assert not [ack for ack in fleet.devices["d1"].acks if ack.status == "refused"]


def test_report_after_its_round_is_late(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1)
    fleet.add_three()
    slow = fleet.devices["d2"]
    slow.mutate = lambda plan, tensors, report: (
        slow.clock.spend(200.0 if plan.server_round == 2 else 0.0) or (tensors, report)
    )
    fleet.serve(config)
    assert statuses(config, 2)["d2"] == "late"
    assert [ack.status for ack in slow.acks if ack.server_round == 2] == ["late"]


def test_corrupt_upload_is_requested_again_then_refused(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1)
    fleet.add_three()
    fleet.devices["d0"].transport.corrupt = 1
    fleet.devices["d1"].transport.corrupt = 3
    fleet.serve(config)
    assert statuses(config, 1) == {"d0": "ok", "d1": "refused", "d2": "ok"}
    assert [ack.status for ack in fleet.devices["d0"].acks[:2]] == ["incomplete", "accepted"]
    reason = next(view.reason for view in views(config, 1) if view.device_id == "d1")
    assert "corrupt 3 times" in reason


def test_lost_chunks_are_requested_on_the_repeated_report(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    device = fleet.devices["d0"]
    dropped: list[UploadTopic] = []

    def drop_until_first_ack(topic: UploadTopic) -> bool:
        if not device.acks:
            dropped.append(topic)
        return not device.acks

    device.transport.drop = drop_until_first_ack
    fleet.serve(config)
    assert len(dropped) > 1
    assert statuses(config, 1)["d0"] == "ok"
    assert [ack.status for ack in device.acks[:2]] == ["incomplete", "accepted"]


def test_rejected_update_is_stored_and_changes_nothing(tmp_path):
    def run(folder, poison):
        (folder / "devices").mkdir(parents=True)
        fleet = Fleet(folder / "devices")
        fleet.add_three()
        config = make_config(folder / "run", min_reports=1, validation={"keep_rejected": 2}, strategy="fixed")

        def mutate(plan, tensors, report):
            if poison:
                tensors["layers.0.q.lora_A"] = np.full_like(tensors["layers.0.q.lora_A"], np.nan)
                return tensors, report
            return tensors, msgspec.structs.replace(report, status="failed", reason="no", update=None)

        fleet.devices["d1"].mutate = mutate
        return fleet, config, fleet.serve(config)

    fleet, config, poisoned = run(tmp_path / "one", poison=True)
    _, _, clean = run(tmp_path / "two", poison=False)
    assert poisoned.adapter_sha256 == clean.adapter_sha256
    assert {statuses(config, n)["d1"] for n in range(1, 6)} == {"refused"}
    kept = sorted((Path(config.run_dir) / "rejected").iterdir())
    assert [path.suffix for path in kept] == [".json", ".safetensors"] * 2
    assert kept[-1].name.startswith("00005-01-d1-")
    assert "NaN" in json.loads(kept[-2].read_text())["reason"]
    assert "NaN" in fleet.devices["d1"].acks[0].reason


def test_unusual_head_in_the_first_round_is_refused(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    fleet.devices["d0"].duration_s = 1.0
    fleet.devices["d0"].mutate = lambda plan, tensors, report: (
        {**tensors, "head.out.weight": np.zeros((3, 8), np.float32)},
        report,
    )
    fleet.serve(config)
    assert statuses(config, 1) == {"d0": "refused", "d1": "ok", "d2": "ok"}
    assert "task head" in next(view.reason for view in views(config, 1) if view.device_id == "d0")
    assert "(3, 8)" in next(view.reason for view in views(config, 2) if view.device_id == "d0")


def test_report_with_a_number_out_of_range_does_not_stop_the_run(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1, strategy="fixed")
    fleet.add_three()
    fleet.devices["d1"].transport.rewrite = lambda topic, payload: payload.replace(
        b'"bytes_down":', b'"bytes_down":9223372036854775808,"ignored":'
    )
    result = fleet.serve(config)
    assert result.num_devices == 2
    assert statuses(config, 1) == {"d0": "ok", "d1": "late", "d2": "ok"}


def test_reason_of_a_device_is_journaled_without_control_characters(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1)
    fleet.add_three()
    fleet.devices["d1"].mutate = lambda plan, tensors, report: (
        tensors,
        msgspec.structs.replace(report, status="failed", reason="a\nb\x1b[31mc\u202ed"),
    )
    fleet.serve(config)
    reason = next(view.reason for view in views(config, 1) if view.device_id == "d1")
    assert reason == "a\\nb\\x1b[31mc\\u202ed"


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (Journal, "put_report", sqlite3.OperationalError("database or disk is full")),
        (Journal, "close_round", sqlite3.OperationalError("database or disk is full")),
        (BlobStore, "put", OSError(28, "No space left on device")),
    ],
)
def test_full_disk_is_a_clear_error_and_the_run_continues(fleet, tmp_path, monkeypatch, owner, name, error):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    original, calls = getattr(owner, name), itertools.count(1)

    def full(self, *args, **options):
        if next(calls) >= 4:
            raise error
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(FedspineError, match=r"run_dir .* cannot be written: .*(full|No space)") as caught:
            fleet.serve(config)
    assert "start the server again" in caught.value.remedy
    assert fleet.serve(config).num_rounds == 5


def test_dead_device_costs_two_deadlines_and_returns_after_a_message(fleet, tmp_path):
    """A device that is gone while the broker keeps "online" for it, until it comes back in round 7."""
    config = make_config(tmp_path / "run", num_rounds=10, min_reports=1)
    fleet.add_three()
    device = fleet.devices["d2"]
    alive, rounds = (device.handle, device.tick, device.next_wakeup), {}

    def opened(name, data):
        if name == "round_opened":
            rounds[data["server_round"]] = data["devices"]
            is_alive = data["server_round"] in (1, *range(7, 11))
            dead = (lambda event: None, lambda: None, lambda: None)
            device.handle, device.tick, device.next_wakeup = alive if is_alive else dead

    fleet.serve(config, on_event=opened)
    assert {number for number, devices in rounds.items() if "d2" in devices} == {1, 2, 3, 8, 9, 10}
    with Journal.open_readonly(config.run_dir) as journal:
        durations = [view.ended_wall_s - view.started_wall_s for view in journal.rounds()]
    assert sum(duration >= config.deadline_s - 1.0 for duration in durations) == 2


def test_new_announcement_discards_the_unfinished_upload(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=1)
    fleet.add_three()
    device = fleet.devices["d1"]
    device.transport.drop = lambda topic: topic.index > 0
    folders = []

    def rewrite(topic, payload):
        if topic.endswith("/report"):
            report = codec.decode(payload, Report)
            uploads = tmp_path / "run" / "uploads"
            folders.append(len(list(uploads.glob("*/d1/*"))))
            other = msgspec.structs.replace(report.update, sha256=codec.digest(str(len(folders)).encode()))
            return codec.encode(msgspec.structs.replace(report, update=other))
        return payload

    device.transport.rewrite = rewrite
    fleet.serve(config)
    assert max(folders) <= 1


def test_too_few_reports_repeat_the_round(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=2)
    fleet.add_three()
    for name in ("d1", "d2"):
        fleet.devices[name].silent = lambda plan: (plan.server_round, plan.attempt) == (2, 1)
    fleet.serve(config)
    with Journal.open_readonly(config.run_dir) as journal:
        rounds = [(view.server_round, view.attempt, view.state, view.accepted) for view in journal.rounds()]
    assert rounds[:4] == [(1, 1, "done", 3), (2, 1, "failed", 1), (2, 2, "done", 3), (3, 1, "done", 3)]


def test_failed_rounds_stop_the_run_and_a_restart_continues(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_reports=2, max_failed_rounds=2)
    fleet.add_three()
    out = msgspec.structs.replace

    def fail(plan, tensors, report):
        if plan.server_round == 3 and plan.attempt < 3:
            return tensors, out(report, status="out_of_memory", reason="4 GiB short")
        return tensors, report

    for name in ("d1", "d2"):
        fleet.devices[name].mutate = fail
    with pytest.raises(FedspineError, match="round 3: 1 of 3 reports were accepted, 2 are needed; 2 attempts failed"):
        fleet.serve(config)
    assert not (tmp_path / "run" / "final").exists()
    assert stopped(config).startswith("round 3: 1 of 3 reports were accepted")
    result = fleet.serve(config)
    assert stopped(config) == ""
    assert result.num_rounds == 5
    assert [v.status for v in views(config, 3) if v.device_id == "d1"] == ["out_of_memory", "out_of_memory", "ok"]


def stopped(config):
    with Journal.open_readonly(config.run_dir) as journal:
        return journal.meta("stopped")


def test_too_few_devices_raise_config_error_at_join_timeout(fleet, tmp_path, caplog):
    caplog.set_level("INFO")
    fleet.add("only")
    with pytest.raises(ConfigError, match=r"1 of 3 devices were online after 50 s \(only\)"):
        fleet.serve(make_config(tmp_path / "run"))
    assert fleet.clock.now() == pytest.approx(50.0, abs=1.0)
    assert caplog.text.count("waiting for devices: 1 of 3 online") == 1  # logged on a change, not at every event


def test_devices_with_another_base_are_rejected_and_named(fleet, tmp_path):
    fleet.add("d0", spec=make_spec("b" * 64))
    fleet.add("d1", spec=make_spec("b" * 64))
    with pytest.raises(ConfigError) as caught:
        fleet.serve(make_config(tmp_path / "run", base_sha256="c" * 64, min_devices=1))
    assert "b" * 64 in str(caught.value)
    assert "c" * 64 in str(caught.value)
    plan = fleet.devices["d0"].plans[0]
    assert isinstance(plan, WaitPlan)
    assert plan.reason == f"its base model has digest {'b' * 64}, this fleet trains {'c' * 64} (base_sha256)."


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spec": make_spec("b" * 64)}, "its base model has digest b"),
        ({"num_labels": 5}, "num_labels = 5"),
        ({"spec": make_spec(intermediate_size=16)}, "intermediate_size 16 instead of 32"),
        ({"task": "causal_lm", "num_labels": 0}, "its task is causal_lm, this fleet's is classification: set task = "),
    ],
)
def test_device_that_does_not_fit_the_fleet_is_left_out(fleet, tmp_path, options, reason):
    config = make_config(tmp_path / "run", min_devices=2)
    fleet.add("d0")
    fleet.add("d1")
    fleet.add("odd", **options)
    fleet.serve(config)
    assert statuses(config, 1) == {"d0": "ok", "d1": "ok"}
    with Journal.open_readonly(config.run_dir) as journal:
        devices = {entry["device_id"]: entry["refused"] for entry in journal.summary()["devices"]}
    assert devices["d0"] == ""
    assert reason in devices["odd"]
    assert reason in fleet.devices["odd"].plans[0].reason
    assert not any(isinstance(plan, WaitPlan) for plan in fleet.devices["d0"].plans)


def test_first_device_with_another_task_is_left_out(fleet, tmp_path):
    config = make_config(tmp_path / "run", task="token_classification", min_devices=2)
    fleet.add("d0")
    fleet.add("d1", task="token_classification")
    fleet.add("d2", task="token_classification")
    result = fleet.serve(config)
    assert statuses(config, 1) == {"d1": "ok", "d2": "ok"}
    layout_json = json.loads((Path(result.final_dir) / "layout.json").read_text())
    assert (layout_json["task"], layout_json["num_labels"]) == ("token_classification", 2)


def test_update_with_a_head_is_refused_in_causal_lm(fleet, tmp_path):
    config = make_config(tmp_path / "run", task="causal_lm", min_devices=3, num_rounds=3, pruning_ratio=0.0)
    for name in ("d0", "d1", "headed"):
        fleet.add(name, task="causal_lm", num_labels=0)
    for name in ("d0", "d1"):
        fleet.devices[name].mutate = lambda plan, tensors, report: (
            {name: value for name, value in tensors.items() if not name.startswith("head.")},
            report,
        )
    result = fleet.serve(config)
    for number in (1, 2, 3):
        assert statuses(config, number) == {"d0": "ok", "d1": "ok", "headed": "refused"}
    tensors = codec.unpack((Path(result.final_dir) / "adapter.safetensors").read_bytes())
    assert all(name.startswith("layers.") for name in tensors)
    layout_json = json.loads((Path(result.final_dir) / "layout.json").read_text())
    assert (layout_json["task"], layout_json["num_labels"]) == ("causal_lm", 0)


def test_device_short_of_memory_gets_only_fitting_ranks(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_devices=2, strategy="fedlora", ranks=[2, 4, 8])
    fleet.add("roomy", memory=(1000, 100, 10))
    fleet.add("tight", memory=(130, 100, 10))  # rank 2 takes 120, rank 4 140
    fleet.serve(config)
    ranks = {
        name: {plan.r for plan in device.plans if isinstance(plan, RoundPlan)} for name, device in fleet.devices.items()
    }
    assert ranks == {"roomy": {4}, "tight": {2}}


def test_finished_run_clears_retained_chunks(fleet, tmp_path):
    fleet.add_three()
    fleet.serve(make_config(tmp_path / "run"))
    while fleet.network.run_next(fleet.clock.now() + 10.0) is not None:
        pass
    assert fleet.network.retained("fedspine/v1/fleet/blob/#") == []
    assert all(device.finished for device in fleet.devices.values())


def test_finished_run_started_again_returns_its_result(fleet, tmp_path):
    config = make_config(tmp_path / "run")
    fleet.add_three()
    result = fleet.serve(config)
    before = fleet.clock.now()
    assert fleet.serve(config) == result
    assert fleet.clock.now() == before


def test_device_that_lost_its_disk_starts_from_the_full_model(fleet, tmp_path):
    config = make_config(tmp_path / "run", num_rounds=6)
    fleet.add_three()
    device = fleet.devices["d1"]

    def new_disk(name, data):
        if name == "round_closed" and data["server_round"] == 3:
            assert device.ratio > 0
            device.layout, device.ratio = Layout.full(SPEC), 0.0
            device.clock.advance_to(fleet.clock.now())
            device.publish_status()
            fleet.clock.spend(1.0)

    fleet.serve(config, on_event=new_disk)
    rows = [view for view in views(config) if view.device_id == "d1"]
    assert [row.status for row in rows] == ["ok"] * 6
    assert rows[3].achieved_ratio == pytest.approx(rows[3].pruning_ratio, abs=0.1)


def test_adapter_download_shrinks_with_rank_and_pruning(fleet, tmp_path):
    """Fewer bytes for a smaller rank, and for everybody once nobody holds the rows any more."""
    config = make_config(tmp_path / "run", num_rounds=7, pruning_ratio=0.6)
    fleet.add_three()
    fleet.serve(config)
    by_rank: dict[int, dict[int, int]] = {}
    for device in fleet.devices.values():
        for plan in device.plans:
            if isinstance(plan, RoundPlan):
                assert len(plan.adapter) == [2, 4].index(plan.r) + 1
                size = sum(ref.size_bytes for ref in plan.adapter)
                assert by_rank.setdefault(plan.server_round, {}).setdefault(plan.r, size) == size
    for sizes in by_rank.values():
        assert sizes.get(2, 0) < sizes.get(4, 10**9)
    of_four = [sizes[4] for _, sizes in sorted(by_rank.items()) if 4 in sizes]
    assert of_four[-1] < of_four[1], "though names and order weigh more than numbers in so small a model"


def test_pruning_of_an_earlier_run_does_not_count(fleet, tmp_path):
    config = make_config(tmp_path / "run", strategy="fixed")
    fleet.add_three()
    device = fleet.devices["d0"]
    device.ratio = 0.5  # its status still describes the run before
    device.publish_status()
    run_round = device.run_round

    def run_round_of_new_run(*arguments):
        if len(device.plans) == 1:
            device.ratio = 0.0
        return run_round(*arguments)

    device.run_round = run_round_of_new_run
    fleet.serve(config)
    ratios = {view.pruning_ratio for view in views(config, 2)}
    assert len(ratios) == 1, "all three start alike"
