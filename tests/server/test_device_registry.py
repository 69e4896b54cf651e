"""The registry: which model the fleet has, and which devices it rejects."""

from __future__ import annotations

import pytest
from fleet_fakes import SPEC, make_config, make_spec

from fedspine_edge.protocol.messages import Status
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.journal.reader import JournalReader


def make_status(device_id, *, spec=SPEC, num_labels=2, state="online", **changes):
    return Status(device_id=device_id, state=state, model=spec, num_labels=num_labels, **changes)


def make_registry(*statuses, **options):
    registry = DeviceRegistry(r_max=4, **options)
    for status in statuses:
        registry.update(status)
    return registry


@pytest.mark.parametrize(
    "odd",
    [{"spec": make_spec("b" * 64)}, {"spec": make_spec(num_parameters=5000)}, {"num_labels": 3}],
    ids=["digest", "parameters", "labels"],
)
def test_first_device_does_not_decide_the_model(odd):
    registry = make_registry(make_status("a", **odd))
    assert registry.online() == ["a"]
    registry.update(make_status("b"))
    registry.update(make_status("c"))
    assert registry.online() == ["b", "c"]
    assert registry.decide_model() == ["a"]
    assert (registry.spec, registry.num_labels) == (SPEC, 2)
    for device_id in ("d", "e", "f"):  # a later majority does not change a decided model
        registry.update(make_status(device_id, **odd))
    assert registry.online() == ["b", "c"]
    assert registry.decide_model() == []


def test_equally_common_models_are_decided_by_the_smallest_device_id():
    registry = make_registry(make_status("b"), make_status("a", spec=make_spec("b" * 64)))
    assert registry.decide_model() == ["b"]


def test_silent_device_stays_offline_until_a_fresh_status():
    registry = make_registry(make_status("a"), make_status("b"))
    for expected in ([], ["a"], []):
        registry.start_round()
        assert registry.end_round(["a"]) == expected
    registry.update(make_status("a"), retained=True)  # after a reconnect the broker sends what it has kept
    assert registry.online() == ["b"]
    registry.update(make_status("a"))
    assert registry.online() == ["a", "b"]


def test_device_that_sends_chunks_is_not_silent():
    registry = make_registry(make_status("a"))
    for _ in range(3):
        registry.start_round()
        registry.mark_seen("a")
        assert registry.end_round(["a"]) == []
    assert registry.online() == ["a"]


def test_offline_devices_do_not_vote():
    registry = make_registry(make_status("a", spec=make_spec("b" * 64)), make_status("b"))
    registry.update(make_status("a", spec=make_spec("b" * 64), state="offline"))
    assert registry.online() == ["b"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_parameters": 1}, "inconsistent"),
        ({"num_heads": 5}, "inconsistent"),
        ({"num_layers": 400, "hidden_size": 2**20, "num_parameters": 2**43}, "would have"),
        ({"intermediate_size": 2**20, "num_layers": 400, "num_parameters": 2**43}, "would have"),
    ],
)
def test_impossible_model_is_rejected_even_alone(changes, reason):
    registry = make_registry(make_status("a", spec=make_spec().__class__(**{**_fields(SPEC), **changes})))
    assert reason in registry.rejection("a")
    assert registry.online() == []


def _fields(spec):
    return {name: getattr(spec, name) for name in spec.__struct_fields__}


def test_device_rejected_when_the_model_is_decided_gets_the_reason(fleet, tmp_path):
    config = make_config(tmp_path / "run", min_devices=2)
    fleet.add("a-odd", spec=make_spec(num_parameters=5000))
    for name in ("d0", "d1"):
        fleet.add(name)
    fleet.serve(config)
    assert "num_parameters 5000 instead of 4000" in fleet.devices["a-odd"].plans[0].reason
    with JournalReader.open_readonly(config.run_dir) as journal:
        refused = {entry["device_id"]: bool(entry["refused"]) for entry in journal.summary()["devices"]}
    assert refused == {"a-odd": True, "d0": False, "d1": False}
