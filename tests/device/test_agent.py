"""A device against a manual server: rounds, messages, and recovery from failures."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny_bert
import tiny_fleet
from tiny_fleet import Fleet, config, round_tensors

from fedspine_edge.clock import RealClock, VirtualClock
from fedspine_edge.config import OptimizerSettings
from fedspine_edge.device.device_state import PersistedState
from fedspine_edge.errors import BrokerUnreachable, CheckpointError, ConfigError, DataError
from fedspine_edge.model.layout import Layout, target_counts
from fedspine_edge.protocol import chunks, codec
from fedspine_edge.protocol.blobs import gather_adapter, order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import BlobRef, Report, RoundPlan
from fedspine_edge.protocol.rank_slices import slice_by_rank
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training.memory import estimate
from fedspine_edge.training.state_dir import StateDir
from fedspine_edge.training.trainer import Trainer
from fedspine_edge.transport.base import Connected, Incoming

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tiny_folder, tiny_csv, tmp_path):
    return config(tiny_folder, tiny_csv, tmp_path / "state")


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def driven(fleet, settings, tiny_base):
    driven = fleet.device(settings, model=tiny_base).start()
    yield driven
    driven.device.close()


def replace(settings, **options):
    return msgspec.structs.replace(settings, **options)


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_device_publishes_status_online_and_offline(fleet, driven, tiny_base):
    driven.settle()
    status = fleet.statuses[-1]
    assert (status.state, status.num_examples, status.num_labels) == ("online", 80, 2)
    assert status.model == tiny_base.spec
    driven.device.close()
    fleet.listen()
    assert fleet.statuses[-1].state == "offline"


def test_crash_publishes_last_will(fleet, driven):
    driven.transport.vanish()
    fleet.listen()
    assert fleet.statuses[-1].state == "offline"


def test_two_rounds_score_then_prune_to_order(fleet, driven, tiny_base):
    spec = tiny_base.spec
    first = fleet.send(adapter=fleet.offer(round_tensors(spec)))
    driven.settle()
    report, update = fleet.reports[-1], fleet.update()
    assert (report.status, report.reason) == ("ok", "")
    assert report.plan_sha256 == codec.digest(first)
    assert (report.r, report.steps, report.skipped_steps, report.pruning_ratio) == (4, 12, 0, 0.0)
    assert (report.num_examples, report.time_kind, report.peak_memory_bytes) == (80, "simulated", 0)
    assert report.loss_after < report.loss_before
    assert report.lora_importance > 0
    assert update["layers.0.q.lora_A"].shape == (4, 32)
    assert update["keep.1.channels"].tolist() == list(range(64))
    assert update["scores.0.channels"].shape == (64,)
    assert (update["scores.0.channels"] > 0).any()
    fleet.ack("accepted")
    driven.settle()
    assert driven.device.next_wakeup() is None

    tensors = round_tensors(spec, order=True)
    tensors |= {name: value for name, value in update.items() if name.startswith("head.")}
    fleet.send(server_round=2, adapter=fleet.offer(tensors), pruning_ratio=0.5, r=8)
    driven.settle()
    report, update = fleet.reports[-1], fleet.update()
    assert (report.status, report.r, report.pruning_ratio) == ("ok", 8, 0.5)
    heads, channels = target_counts(spec, 0.5)
    assert update["keep.0.heads"].tolist() == sorted(tensors["order.0.heads"][:heads].tolist())
    assert update["keep.1.channels"].tolist() == sorted(tensors["order.1.channels"][:channels].tolist())
    assert update["layers.1.down.lora_A"].shape == (8, channels)
    assert update["scored.0.channels"].tolist() == list(range(64)), "scores are of the layout before pruning"
    assert fleet.statuses[-1].pruning_ratio == 0.5


def test_local_layout_keeps_highest_scores(fleet, driven, tiny_base):
    spec = tiny_base.spec
    fleet.send(adapter=fleet.offer(round_tensors(spec)), layout="local", pruning_ratio=0.5)
    driven.settle()
    update = fleet.update()
    heads, channels = target_counts(spec, 0.5)
    best = np.argsort(-update["scores.0.channels"], kind="stable")[:channels]
    assert update["keep.0.channels"].tolist() == sorted(best.tolist())
    assert update["keep.0.heads"].size == heads


def test_device_sends_allow_list_only_and_no_text(fleet, tiny_folder, tmp_path, tiny_base, caplog):
    caplog.set_level("DEBUG")
    rows = tiny_bert.sentences(60)
    settings = config(tiny_folder, tiny_bert.write_csv(tmp_path / "d.csv", rows), tmp_path / "s")
    driven = fleet.device(settings, model=tiny_base).start()
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec, order=True)), pruning_ratio=0.25)
    driven.settle()
    driven.device.close()
    fleet.listen()
    assert fleet.reports[-1].status == "ok"
    codec.check_names(fleet.update(), "update")
    assert set(Report.__struct_fields__) == {
        *("schema", "run_id", "device_id", "server_round", "plan_sha256", "status", "reason", "update"),
        *("num_examples", "loss_before", "loss_after", "accuracy_before", "accuracy_after", "train_loss"),
        *("lora_importance", "pruning_ratio", "r", "completion_time_s", "time_kind", "steps", "skipped_steps"),
        *("peak_memory_bytes", "bytes_down", "bytes_up"),
    }
    assert re.search(r"round 1: loss \d\.\d{4} → \d\.\d{4}, ", caplog.text)
    sent = b"\n".join(fleet.published) + caplog.text.encode()
    assert b"keep.0.heads" in sent, "the search sees what is sent"
    for text, _ in rows:
        assert text.encode() not in sent
    for word in (*tiny_bert.FILLER[9:10], *tiny_bert.GOOD, *tiny_bert.BAD):
        assert f" {word} ".encode() not in sent


def test_download_requests_windows_of_16_chunks(fleet, driven, tiny_base, monkeypatch):
    asked = []
    subscribe = driven.transport.subscribe
    monkeypatch.setattr(driven.transport, "subscribe", lambda *topics: (asked.append(topics), subscribe(*topics)))
    ref = fleet.offer(round_tensors(tiny_base.spec, r=16))
    assert ref.num_chunks > 32
    fleet.send(adapter=ref)
    driven.settle()
    assert [len(topics) for topics in asked] == [16] * (ref.num_chunks // 16) + [ref.num_chunks % 16]
    assert fleet.reports[-1].status == "ok"
    assert fleet.reports[-1].bytes_down == ref.size_bytes
    assert set(driven.transport._filters) == set(tiny_fleet.TOPICS.device_filters("d1"))


def test_stalled_download_is_retried_and_resumed(fleet, settings, tiny_base):
    clock = VirtualClock()
    driven = fleet.device(settings, model=tiny_base, clock=clock).start()
    ref = fleet.offer(round_tensors(tiny_base.spec))
    topic = tiny_fleet.TOPICS.blob(ref.sha256, 17)
    hidden = fleet.broker._retained.pop(topic)
    fleet.send(adapter=ref, deadline_s=400.0)
    driven.settle()
    assert not fleet.reports
    clock.advance_to(driven.device.next_wakeup())
    driven.transport.vanish()
    driven.device._runner.close()

    again = fleet.device(settings, model=tiny_base, clock=clock).start()
    again.settle()
    kept = list((Path(settings.state_dir) / "download").glob("*/*"))
    assert len(kept) == ref.num_chunks - 1, "only the missing chunk is still wanted"
    fleet.transport.publish(topic, hidden, retain=True)
    again.settle()
    assert fleet.reports[-1].status == "ok"
    assert not list((Path(settings.state_dir) / "download").iterdir())
    again.device.close()


def test_blob_with_wrong_hash_fails_round(fleet, driven, tiny_base):
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec), corrupt=True))
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "corrupt" in fleet.reports[-1].reason
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(tiny_base.spec, seed=4)))
    driven.settle()
    assert fleet.reports[-1].status == "ok"


def test_report_is_repeated_until_acknowledged(fleet, settings, tiny_base):
    clock = VirtualClock()
    driven = fleet.device(settings, model=tiny_base, clock=clock).start()
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert clock.now() == pytest.approx(fleet.reports[0].completion_time_s), "the simulated time is spent on the clock"
    clock.advance_to(driven.device.next_wakeup())
    driven.device.tick()
    driven.settle()
    assert len(fleet.reports) == 2
    sha256 = fleet.reports[0].update.sha256
    fleet.chunks.clear()
    fleet.ack("incomplete", missing=(0,))
    driven.settle()
    assert set(fleet.chunks[sha256]) == {0}
    driven.device.handle(Connected())
    driven.settle()
    assert len(fleet.reports) == 3
    fleet.ack("accepted", server_round=7)  # another round's
    driven.settle()
    assert driven.device.next_wakeup() is not None
    fleet.ack("accepted")
    driven.settle()
    assert driven.device.next_wakeup() is None
    driven.device.close()


def test_finished_round_is_reported_not_trained_again(fleet, settings, tiny_base, monkeypatch):
    driven = fleet.device(settings, model=tiny_base).start()
    payload = fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    driven.device.close()
    fleet.chunks.clear()

    def never(self, *arguments):
        raise AssertionError("trained a finished round again")

    monkeypatch.setattr(Trainer, "_take_step", never)
    again = fleet.device(settings, model=tiny_base).start()
    again.settle()  # the retained plan arrives again
    fleet.transport.publish(tiny_fleet.TOPICS.plan("d1"), payload, retain=True)
    again.settle()
    assert len({codec.encode(report) for report in fleet.reports}) == 1
    assert len(fleet.reports) > 1
    fleet.ack("incomplete", missing=tuple(range(fleet.reports[0].update.num_chunks)))
    again.settle()
    assert fleet.update()
    again.device.close()


def test_training_error_is_reported_without_data(fleet, driven, tiny_base, monkeypatch):
    secret = "zanzibar story"

    def broken(self, *arguments):
        raise ValueError(secret)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", broken)
        fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
        driven.settle()
    report = fleet.reports[-1]
    assert report.status == "failed"
    assert report.reason.startswith("ValueError at test_agent.py:")
    assert secret not in report.reason
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert fleet.reports[-1].status == "ok", "the next round starts from a fresh model"


def test_out_of_memory_is_reported_as_such(fleet, driven, tiny_base, monkeypatch):
    def full(self, *arguments):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_forward", full)
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert fleet.reports[-1].status == "out_of_memory"


def test_smaller_micro_batch_is_in_report(fleet, driven, tiny_base, monkeypatch):
    forward = Trainer._forward

    def tight(self, batch):
        if len(batch["labels"]) > 4:
            raise RuntimeError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "_forward", tight)
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert fleet.reports[-1].status == "ok"
    assert "4 instead of 8" in fleet.reports[-1].reason


def test_adapter_of_other_shape_fails_round(fleet, driven, tiny_base, caplog):
    caplog.set_level("INFO")
    tensors = round_tensors(tiny_base.spec, r=2)
    fleet.send(adapter=fleet.offer(tensors), r=4)
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "rank 4" in fleet.reports[-1].reason
    fleet.ack("accepted")
    driven.settle()
    assert f"round 1: the server has recorded this device's failure ({fleet.reports[-1].reason})" in caplog.text
    assert "report accepted" not in caplog.text


def test_device_fetches_only_slices_of_plan(fleet, driven, tiny_base):
    spec = tiny_base.spec
    tensors = round_tensors(spec, r=8, order=True)
    slices = [fleet.offer(one) for one in slice_by_rank(tensors, [4, 8], Layout.full(spec), "float32")]
    fleet.send(server_round=2, adapter=slices[:1], r=4)
    driven.settle()
    assert fleet.reports[-1].bytes_down == slices[0].size_bytes
    short = fleet.update()
    fleet.send(server_round=3, adapter=slices, r=8)
    driven.settle()
    assert fleet.reports[-1].bytes_down == sum(ref.size_bytes for ref in slices)
    assert fleet.update()["layers.0.q.lora_A"].shape[0] == 8

    same_start = Fleet()
    settings = replace(driven.device.config, state_dir=driven.device.config.state_dir + "2")
    again = same_start.device(settings, model=tiny_base).start()
    same_start.send(server_round=2, adapter=same_start.offer(tensors), r=4)
    again.settle()
    same(same_start.update(), short)
    again.device.close()


def test_adapter_narrower_than_device_fails_round(fleet, driven, tiny_base):
    spec = tiny_base.spec
    tensors = round_tensors(spec, order=True)
    order = order_from_tensors(spec, tensors)
    small = Layout.prefix(spec, order, [target_counts(spec, 0.5)] * spec.num_layers)
    fleet.send(server_round=2, adapter=[fleet.offer(one) for one in slice_by_rank(tensors, [8], small)])
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "pruned more" in fleet.reports[-1].reason
    fleet.send(server_round=3, adapter=[fleet.offer(one) for one in slice_by_rank(tensors, [8], Layout.full(spec))])
    driven.settle()
    assert fleet.reports[-1].status == "ok"


def test_unreported_pruning_returns_to_order(fleet, driven, tiny_base):
    spec = tiny_base.spec
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(spec, order=True, seed=3)), pruning_ratio=0.5)
    driven.settle()
    other = round_tensors(spec, order=True, seed=4)
    fleet.send(server_round=3, adapter=fleet.offer(other), pruning_ratio=0.5)
    driven.settle()
    _, channels = target_counts(spec, 0.5)
    assert fleet.reports[-1].status == "ok"
    assert fleet.update()["keep.0.channels"].tolist() == sorted(other["order.0.channels"][:channels].tolist())
    assert fleet.update()["scored.0.channels"].tolist() == fleet.update()["keep.0.channels"].tolist()


def test_new_run_starts_from_unpruned_base(fleet, driven, tiny_base):
    spec = tiny_base.spec
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(spec, order=True)), pruning_ratio=0.5)
    driven.settle()
    fleet.send(run_id="next", server_round=1, adapter=fleet.offer(round_tensors(spec)))
    driven.settle()
    assert fleet.update()["keep.0.channels"].size == 64
    assert fleet.reports[-1].pruning_ratio == 0.0


def test_wait_old_and_malformed_plans_are_ignored(fleet, driven, tiny_base):
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    fleet.ack("accepted", server_round=2)
    fleet.send(server_round=1)
    fleet.send_wait()
    fleet.transport.publish(tiny_fleet.TOPICS.plan("d1"), b"{rubbish")
    fleet.transport.publish(tiny_fleet.TOPICS.ack("d1"), b"\xff")
    driven.settle()
    assert len(fleet.reports) == 1
    assert not driven.device.finished
    fleet.finish()
    driven.settle()
    assert driven.device.finished


def test_newer_plan_stops_training(fleet, settings, tiny_base, monkeypatch):
    take_step, sent = Trainer._take_step, []

    def interrupts(self, *arguments):
        take_step(self, *arguments)
        if self.step == 2 and not sent:
            sent.append(fleet.send(server_round=2, adapter=ref))
        elif sent and self.step == 11:
            fleet.finish()

    ref = fleet.offer(round_tensors(tiny_base.spec))
    fleet.send(adapter=ref)
    monkeypatch.setattr(Trainer, "_take_step", interrupts)
    driven = fleet.device(replace(settings, time_kind="measured"), model=tiny_base, clock=RealClock())
    assert driven.device.run() == 0
    fleet.listen()
    assert not [report for report in fleet.reports if report.server_round == 1]


def test_report_is_sent_after_broker_outage(fleet, settings, tiny_base):
    clock = VirtualClock()
    driven = fleet.device(settings, model=tiny_base, clock=clock).start()
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec), chunk_bytes=65536))
    events = []
    while (event := driven.transport.receive(timeout_s=0.0)) is not None:
        if isinstance(event, Connected) or event.topic.endswith("plan"):
            driven.device.handle(event)
        else:
            events.append(event)
    fleet.broker.stop()
    for event in events:
        driven.device.handle(event)
    fleet.broker.start()
    driven.settle()
    (report,) = fleet.reports
    fleet.ack("incomplete", missing=tuple(range(report.update.num_chunks)))
    driven.settle()
    assert fleet.update()
    driven.device.close()


def test_run_finished_returns_zero(fleet, settings, tiny_base):
    fleet.finish()
    driven = fleet.device(replace(settings, time_kind="measured"), model=tiny_base)
    assert driven.device.run() == 0
    fleet.listen()
    assert fleet.statuses[-1].state == "offline"


def test_clipping_bounds_update_and_noise_is_secret(fleet, settings, tiny_base, tmp_path):
    tensors = round_tensors(tiny_base.spec, order=True)

    def update(name, **options):
        options = {"time_kind": "simulated", **options}
        driven = fleet.device(replace(settings, state_dir=str(tmp_path / name), **options), model=tiny_base).start()
        fleet.send(adapter=fleet.offer(tensors), pruning_ratio=0.5)
        driven.settle()
        driven.device.close()
        return fleet.update()

    def norm(update):
        layout = Layout(
            tiny_base.spec,
            tuple(update[f"keep.{i}.heads"].astype(np.int64) for i in range(2)),
            tuple(update[f"keep.{i}.channels"].astype(np.int64) for i in range(2)),
        )
        head = {n: v for n, v in tiny_base.adapter_state().items() if n.startswith("head.")}
        received = {**head, **gather_adapter(tensors, layout, 4)}
        return float(np.sqrt(sum(np.sum((update[n] - received[n]) ** 2.0) for n in received)))

    free = norm(update("free"))
    clipped = update("clipped", clip_update_norm=free / 4)
    assert norm(clipped) == pytest.approx(free / 4, rel=1e-3)
    noisy = update("noisy", clip_update_norm=free / 4, noise_std=0.1)
    same(noisy, update("again", clip_update_norm=free / 4, noise_std=0.1))
    noise = noisy["layers.0.up.lora_A"] - clipped["layers.0.up.lora_A"]
    assert noise.std() == pytest.approx(0.1 * free / 4, rel=0.3)
    # outside a simulation everything that the server knows is equal here, the noise is not
    real = [update(name, clip_update_norm=free / 4, noise_std=0.1, time_kind="modelled") for name in ("one", "two")]
    assert (real[0]["layers.0.up.lora_A"] != real[1]["layers.0.up.lora_A"]).any()
    with StateDir(tmp_path / "one") as one, StateDir(tmp_path / "two") as two:
        assert one.secret() == one.secret() != two.secret()


def test_damaged_or_foreign_state_raises_with_remedy(fleet, settings, tiny_base):
    driven = fleet.device(settings, model=tiny_base).start()
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    driven.device.close()
    with pytest.raises(CheckpointError, match="another device_id"):
        fleet.device(replace(settings, device_id="d2"), model=tiny_base).device.start()
    path = Path(settings.state_dir) / "device.state"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"device\.state") as caught:
        fleet.device(settings, model=tiny_base).device.start()
    assert "joins the fleet as a new device" in caught.value.remedy


def test_start_with_invalid_inputs_raises(fleet, settings, tiny_base, tmp_path):
    def started(**options):
        fleet.device(replace(settings, **options), model=tiny_base).device.start()

    with pytest.raises(DataError, match="does not exist"):
        started(data=replace(settings.data, path=str(tmp_path / "none.csv")))
    with pytest.raises(DataError, match="96 examples"):
        started(data=replace(settings.data, holdout=96))
    with pytest.raises(CheckpointError, match="no_such_folder"):
        fleet.device(replace(settings, model=str(tmp_path / "no_such_folder"))).device.start()
    fleet.broker.stop()
    with pytest.raises(BrokerUnreachable):
        started(reconnect_timeout_s=0.01)
    fleet.broker.start()
    driven = fleet.device(settings, model=tiny_base).start()  # the failed starts left no lock behind
    with pytest.raises(ConfigError, match="in use"):
        started()
    driven.device.close()


class PowerLoss(BaseException):
    """Ends everything at once, as a cut cable does; nothing in the package catches it."""


def test_repeated_crash_at_one_step_fails_round(fleet, settings, tiny_base, monkeypatch):
    def dies(self, *arguments):
        raise PowerLoss

    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    take_step = Trainer._take_step
    monkeypatch.setattr(Trainer, "_take_step", dies)
    for _ in range(6):
        driven = fleet.device(settings, model=tiny_base).start()
        with pytest.raises(PowerLoss):
            driven.settle()
        driven.device.close()
    driven = fleet.device(settings, model=tiny_base).start()
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "stopped 5 times after step 0" in fleet.reports[-1].reason
    monkeypatch.setattr(Trainer, "_take_step", take_step)
    fleet.send(server_round=2, adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert fleet.reports[-1].status == "ok"
    driven.device.close()


@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [
        (Trainer, "evaluate", 1),
        (Trainer, "_take_step", 4),
        (Trainer, "_take_step", 10),
        (ImportanceTracker, "compact", 1),
        (Trainer, "_take_step", 15),
        (Trainer, "evaluate", 2),
        (BlobStore, "put", 1),
        (PersistedState, "save", 1),
        (BlobStore, "prune", 1),
    ],
)
def test_power_loss_at_any_step_changes_nothing(fleet, settings, tiny_base, tmp_path, monkeypatch, owner, method, call):
    plan = tiny_fleet.killed_plan(fleet, tiny_base.spec)

    def report_of(name):
        driven = fleet.device(replace(settings, state_dir=str(tmp_path / name)), model=tiny_base).start()
        try:
            fleet.send(**plan)
            driven.settle()
        finally:
            driven.device.close()
        fleet.ack("incomplete", server_round=2, missing=tuple(range(fleet.reports[-1].update.num_chunks)))
        return fleet.reports[-1], fleet.update()

    undisturbed = report_of("undisturbed")
    real, calls = getattr(owner, method), []

    def dies(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise PowerLoss
        return real(self, *arguments, **options)

    monkeypatch.setattr(owner, method, dies)
    with pytest.raises(PowerLoss):
        report_of("disturbed")
    report, update = report_of("disturbed")
    assert report == undisturbed[0]
    same(update, undisturbed[1])


def test_killed_device_resumes_with_same_bits(tiny_folder, tiny_csv, tmp_path):
    """A real SIGKILL after pruning; the next process ends as one that was never disturbed."""

    def device(*kill_at):
        command = [sys.executable, tiny_fleet.__file__, tiny_folder, tiny_csv, tmp_path / "state", tmp_path, *kill_at]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([str(part) for part in command], cwd=ROOT, timeout=120, env=environment, check=False)

    assert device(14).returncode == -signal.SIGKILL
    assert device().returncode == 0
    steps = [int(line) for line in (tmp_path / "steps.txt").read_text().split()]
    assert steps.count(0) == 1, "the round was not started over"
    assert steps[-1] == 17
    report = codec.decode((tmp_path / "report.json").read_bytes(), Report)
    update = codec.unpack((tmp_path / "update.bin").read_bytes())

    fleet = Fleet()
    driven = fleet.device(config(tiny_folder, tiny_csv, tmp_path / "undisturbed")).start()
    fleet.send(**tiny_fleet.killed_plan(fleet, driven.device.spec))
    driven.settle()
    driven.device.close()
    same(fleet.update(), update)
    assert fleet.reports[-1] == report
    assert report.pruning_ratio == 0.5


def test_memory_limit_is_kept_and_reported(fleet, tiny_folder, tmp_path, tiny_base):
    rows = [("film was " + text, label) for text, label in tiny_bert.sentences(120)]
    csv = tiny_bert.write_csv(tmp_path / "long.csv", rows)
    needed = estimate(tiny_base, micro_batch=64, tokens=14, r=4).peak_bytes
    limit_mib = (needed - 1) // 2**20
    settings = config(tiny_folder, csv, tmp_path / "tight", memory_limit_mib=limit_mib)
    driven = fleet.device(settings, model=tiny_base).start()
    training = OptimizerSettings(learning_rate=1e-2, batch_size=64, max_length_tokens=14, total_steps=60)
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)), training=training)
    driven.settle()
    report = fleet.reports[-1]
    assert report.status == "ok"
    assert report.reason.startswith("memory_limit_mib allows no more; trained ")
    assert "instead of 64 examples at a time and accumulated gradients" in report.reason
    status = fleet.statuses[-1]
    assert status.memory_bytes == limit_mib * 2**20
    of_one = status.memory_base_bytes + 4 * status.memory_per_rank_bytes
    assert of_one == pytest.approx(estimate(tiny_base, micro_batch=1, tokens=14, r=4).peak_bytes, rel=0.02)
    assert of_one < status.memory_bytes
    assert fleet.statuses[0].memory_base_bytes > 0
    driven.device.close()


def test_order_that_is_no_permutation_fails_round(fleet, driven, tiny_base):
    tensors = round_tensors(tiny_base.spec, order=True)
    tensors["order.0.heads"][:] = 0
    fleet.send(server_round=2, adapter=fleet.offer(tensors), pruning_ratio=0.5)
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "order of layer 0 heads is not a permutation" in fleet.reports[-1].reason


def test_adapter_beyond_the_models_size_fails_round_without_download(fleet, driven):
    ref = BlobRef(sha256="0" * 64, size_bytes=2**30)
    fleet.send(adapter=[ref, ref])
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "more than an adapter of this model can have" in fleet.reports[-1].reason
    assert set(driven.transport._filters) == set(tiny_fleet.TOPICS.device_filters("d1"))


def test_full_disk_during_training_is_named_in_report(fleet, driven, tiny_base, monkeypatch):
    take_step = Trainer._take_step

    def disk_full(self, *arguments):
        if self.step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/path")
        take_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_take_step", disk_full)
    fleet.send(adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert fleet.reports[-1].status == "failed"
    assert "No space left on device" in fleet.reports[-1].reason
    assert "secret" not in fleet.reports[-1].reason


def test_malformed_messages_do_not_stop_device(fleet, driven, tiny_base):
    rng = np.random.default_rng(5)
    topics = [tiny_fleet.TOPICS.plan("d1"), tiny_fleet.TOPICS.ack("d1")]
    plan = codec.encode(RoundPlan(run_id="run", device_id="d1", server_round=1, r=4))
    for number in range(300):
        payload = bytearray(plan if number % 2 else rng.bytes(int(rng.integers(0, 200))))
        for _ in range(int(rng.integers(1, 6))):
            if payload:
                payload[int(rng.integers(len(payload)))] = int(rng.integers(256))
        driven.device.handle(Incoming(topics[number % 3 % 2], bytes(payload)))
    for mutated in range(60):
        tensors = round_tensors(tiny_base.spec, order=True)
        blob = bytearray(codec.pack(tensors))
        for _ in range(4):
            blob[int(rng.integers(min(len(blob), 4096)))] = int(rng.integers(256))
        ref, parts = chunks.split(bytes(blob), chunk_bytes=65536)
        for index, data in enumerate(parts):
            fleet.transport.publish(tiny_fleet.TOPICS.blob(ref.sha256, index), data, retain=True)
        fleet.send(server_round=2, attempt=mutated + 1, adapter=ref, tau=0, recovery_steps=0)
        driven.settle()
    fleet.send(server_round=3, adapter=fleet.offer(round_tensors(tiny_base.spec)))
    driven.settle()
    assert (fleet.reports[-1].server_round, fleet.reports[-1].status) == (3, "ok")
