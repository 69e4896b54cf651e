"""One round on a device: evaluate, score, prune, recover, evaluate, and make the report and the update.

`LocalRound.run` runs the phases in this order. After each phase, and every few steps, it writes a checkpoint, so a
device that loses power continues within the round and ends with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspine_edge.arrays import Tensors
from fedspine_edge.config import DeviceConfig
from fedspine_edge.device.cost_meter import CostMeter
from fedspine_edge.device.device_state import PruningState, RoundResult
from fedspine_edge.device.privacy import clip_and_add_noise
from fedspine_edge.errors import CheckpointError, LayoutError, ModelError
from fedspine_edge.model.deterministic_init import kaiming_uniform
from fedspine_edge.model.layout import Layout, Order, full_shape, module_names, split_name, target_counts
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import (
    KEEP,
    adapter_and_head,
    gather_adapter,
    head_tensors,
    scores_to_tensors,
)
from fedspine_edge.protocol.chunks import ref_of
from fedspine_edge.protocol.codec import check_tensors, pack
from fedspine_edge.protocol.messages import MAX_FIGURE, Report, RoundPlan
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import GroupScores, select_layout
from fedspine_edge.training.base_model import BaseModelLoader
from fedspine_edge.training.batching import Encoded, lengths_of
from fedspine_edge.training.loss import can_pack
from fedspine_edge.training.memory import fitting_micro_batch
from fedspine_edge.training.peak_memory import PeakMemory
from fedspine_edge.training.state_dir import StateDir, StateRecord, prefixed, unprefixed
from fedspine_edge.training.trainer import BatchSettings, Trainer

log = logging.getLogger("fedspine_edge.device")

ROUND = "round"
CHECKPOINT_STEPS = 5
"""Minimum number of steps between checkpoints. There are more if writing one takes a noticeable share of the time."""

MAX_RESTARTS_WITHOUT_PROGRESS = 5
"""Restarts without reaching the next checkpoint after which the round fails, such as after kills for lack of memory."""


@dataclass(frozen=True)
class RoundInputs:
    """Inputs of one round.

    Attributes:
        plan: The plan.
        plan_sha256: Digest of the plan's payload.
        adapter: Tensors of the round's blobs; empty if the plan has none.
        order: The consensus order in them; None if there is none.
        pruning_state: Result of the device's pruning so far.
        meter: Cost meter of the round; restored from a checkpoint.
    """

    plan: RoundPlan
    plan_sha256: str
    adapter: Mapping[str, npt.NDArray[Any]]
    order: Order | None
    pruning_state: PruningState
    meter: CostMeter


@dataclass(frozen=True)
class DeviceResources:
    """Resources that all rounds of a device share.

    Attributes:
        config: Settings of the device.
        loader: Loader of unpruned models.
        train: Tokenized training examples.
        holdout: Tokenized held-out examples.
        pad_id: Id of the tokenizer's padding token.
        state_dir: Folder of the checkpoints.
        peak_memory: Measures peak memory; None if devices share a process.
    """

    config: DeviceConfig
    loader: BaseModelLoader
    train: Sequence[Encoded]
    holdout: Sequence[Encoded]
    pad_id: int
    state_dir: StateDir
    peak_memory: PeakMemory | None = None


class LocalRound:
    """One round of a device.

    Args:
        inputs: Plan and state at the start of the round.
        resources: Model, data and folders of the device.
        model: Model of an earlier round, which is reused if its layout allows; None loads one.
        on_step: Called after every step. An exception that it raises stops the round.
    """

    def __init__(
        self,
        inputs: RoundInputs,
        resources: DeviceResources,
        *,
        model: PrunableModel | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self._plan = inputs.plan
        self._inputs = inputs
        self._meter = inputs.meter
        self._order = inputs.order
        self._state = inputs.pruning_state
        self._resources = resources
        self._config = resources.config
        self._on_step = on_step
        self._global = global_adapter(inputs.plan, inputs.adapter, self._state.layout.spec, resources.loader)
        self._phase = "before"
        self._info: dict[str, Any] = {}
        self._scores: Tensors = {}
        self._restarts_without_progress = 0
        self._written_at = time.monotonic()
        self._write_took_s = 0.0
        self._written_step = 0

    def run(self) -> RoundResult:
        """Run the round from its start, or from the last checkpoint.

        Raises `FedspineError` if the round fails, and whatever `on_step` raises.
        """
        plan = self._plan
        peak_memory = self._resources.peak_memory
        if peak_memory is not None:
            peak_memory.reset()
        with self._meter.working():
            trainer = self._resume() or self._begin()
            if self._phase == "before":
                before = trainer.evaluate()
                self._info |= {"loss_before": before.loss, "accuracy_before": before.accuracy}
                self._finish(trainer, "score")
            if self._phase == "score":
                trainer.run(plan.tau, scored=True, on_step=lambda: self._stepped(trainer))
                self._finish(trainer, "prune")
            if self._phase == "prune":
                self._prune(trainer)
                self._finish(trainer, "recover")
            if self._phase == "recover":
                trainer.run(plan.tau + plan.recovery_steps, on_step=lambda: self._stepped(trainer))
                self._finish(trainer, "after")
            after = trainer.evaluate()
            update = self._update(trainer.model)
        ref = ref_of(update)
        self._meter.transfer(up_bytes=ref.size_bytes)
        tracker = _tracker_of(trainer)
        report = Report(
            run_id=plan.run_id,
            device_id=plan.device_id,
            server_round=plan.server_round,
            plan_sha256=self._inputs.plan_sha256,
            status="ok",
            reason="; ".join(trainer.warnings()),
            update=ref,
            num_examples=len(self._resources.train),
            loss_before=_finite(self._info["loss_before"]),
            loss_after=_finite(after.loss),
            accuracy_before=self._info["accuracy_before"],
            accuracy_after=after.accuracy,
            train_loss=_finite(trainer.train_loss),
            lora_importance=_finite(tracker.lora_importance()),
            pruning_ratio=self._info["pruning_ratio"],
            r=plan.r,
            completion_time_s=self._meter.completion_s(),
            time_kind=self._config.time_kind,
            steps=trainer.step,
            skipped_steps=trainer.skipped + trainer.spikes,
            peak_memory_bytes=0 if peak_memory is None else peak_memory.read(),
            bytes_down=self._meter.bytes_down,
            bytes_up=self._meter.bytes_up,
        )
        pruning_state = PruningState(trainer.model.layout, self._info["pruning_ratio"], tracker.state_dict())
        return RoundResult(report, update, pruning_state)

    def _begin(self) -> Trainer:
        state = self._state
        layout = state.initial_layout(self._order if self._plan.layout == "consensus" else None)
        self._info = {"pruning_ratio": state.pruning_ratio}
        self._meter.transfer(down_bytes=sum(ref.size_bytes for ref in self._plan.adapter))
        trainer = self._trainer(layout)
        if state.importance is not None and layout.to_dict() == state.layout.to_dict():
            _tracker_of(trainer).load_state_dict(state.importance)
        self._checkpoint(trainer)
        return trainer

    def _resume(self) -> Trainer | None:
        saved = self._resources.state_dir.read(ROUND)
        if saved is None or saved.info.get("plan_sha256") != self._inputs.plan_sha256:
            return None
        try:
            layout = Layout.from_tensors(self._state.layout.spec, saved.tensors)
            trainer = self._trainer(layout)
            trainer.restore(StateRecord(saved.info["trainer"], unprefixed("trainer.", saved.tensors)))
            self._meter.restore(saved.info["meter"])
            self._phase, self._info = saved.info["phase"], saved.info["info"]
            self._scores = unprefixed("update.", saved.tensors)
            self._restarts_without_progress = int(saved.info["fruitless_starts"]) + 1
        except (KeyError, TypeError, ValueError, LayoutError, CheckpointError) as error:
            raise self._resources.state_dir.damaged(
                ROUND, f"it does not fit the model ({type(error).__name__})"
            ) from error
        if self._restarts_without_progress > MAX_RESTARTS_WITHOUT_PROGRESS:
            restarts = self._restarts_without_progress - 1
            raise ModelError(
                f"the device stopped {restarts} times after step {trainer.step} without progress.",
                remedy="It probably runs out of memory. Reduce batch_size or max_length_tokens.",
            )
        log.info("round %d: resumed in phase %s after step %d", self._plan.server_round, self._phase, trainer.step)
        self._checkpoint(trainer)
        return trainer

    def _trainer(self, layout: Layout) -> Trainer:
        """Return a trainer at the first step of the round: the model at `layout` with the fleet's adapter."""
        plan = self._plan
        if self.model is None or not layout.is_within(self.model.layout):
            self.model = self._resources.loader.load(plan.seed)
        self.model.compact(layout)
        self.model.load_adapter(self._global, r=plan.r, scaling=plan.scaling)
        tracker = ImportanceTracker(
            self.model, plan.criterion, plan.importance_metric, seed=plan.seed, scope=plan.scope
        )
        return Trainer(
            self.model,
            self._resources.train,
            self._resources.holdout,
            plan.training,
            round_steps=plan.tau + plan.recovery_steps,
            batches=BatchSettings(
                pad_id=self._resources.pad_id,
                seed=self._config.seed,
                pack=can_pack(self.model, plan.training.max_length_tokens),
                micro_batch=self._micro_batch(self.model),
            ),
            tracker=tracker,
            meter=self._meter,
        )

    def _micro_batch(self, model: PrunableModel) -> int:
        """Return the number of examples at a time that fits the memory limit, or the whole batch without a limit."""
        training, limit_bytes = self._plan.training, self._config.memory_limit_mib * 2**20
        if not limit_bytes:
            return training.batch_size
        tokens = int(lengths_of(self._resources.train).max())
        return fitting_micro_batch(model, batch_size=training.batch_size, tokens=tokens, limit_bytes=limit_bytes)

    def _prune(self, trainer: Trainer) -> None:
        plan, layout = self._plan, trainer.model.layout
        tracker = _tracker_of(trainer)
        scores: GroupScores | None = None
        if tracker.ready:
            scores = tracker.scores()
            self._scores = scores_to_tensors(layout, scores.heads, scores.channels)
        target = layout
        if plan.layout == "local" and plan.pruning_ratio > self._state.pruning_ratio:
            if scores is None:
                raise ModelError(
                    "no step was scored, so the groups have no importance.", remedy="Set training.tau to 1 or more."
                )
            target = select_layout(scores, layout, plan.pruning_ratio, scope=plan.scope, round_to=plan.round_to)
        elif plan.layout == "consensus" and self._order is not None:
            counts = [
                target_counts(layout.spec, plan.pruning_ratio, round_to=plan.round_to, at_most=kept)
                for kept in layout.counts
            ]
            target = Layout.prefix(layout.spec, self._order, counts)
        if plan.layout == "local" or self._order is not None:
            self._info["pruning_ratio"] = max(self._state.pruning_ratio, plan.pruning_ratio)
        trainer.compact(target)

    def _update(self, model: PrunableModel) -> bytes:
        """Return the update blob. It contains allow-listed tensors only, in compact coordinates."""
        config = self._config
        adapter: dict[str, npt.NDArray[Any]] = dict(model.adapter_state())
        if config.clip_update_norm > 0:
            adapter = dict(
                clip_and_add_noise(
                    adapter,
                    {**head_tensors(self._global), **gather_adapter(self._global, model.layout, self._plan.r)},
                    clip_norm=config.clip_update_norm,
                    noise_std=config.noise_std,
                    seed=(self._noise_secret(), config.device_id, self._plan.run_id, self._plan.server_round),
                )
            )
        with np.errstate(over="ignore"):  # reported as an error below
            tensors: Tensors = {name: value.astype(config.upload_dtype) for name, value in adapter.items()}
        non_finite = [name for name, value in tensors.items() if not np.isfinite(value).all()]
        if non_finite:
            raise ModelError(f"the update's {non_finite[0]} is not finite in {config.upload_dtype}; training diverged.")
        tensors |= model.layout.to_tensors(KEEP)
        tensors |= self._scores
        check_tensors(tensors, "update")
        return pack(tensors)

    def _noise_secret(self) -> str:
        """Return the secret part of the noise seed. A simulation has none, because it must be repeatable."""
        return str(self._config.seed) if self._config.time_kind == "simulated" else self._resources.state_dir.secret()

    def _stepped(self, trainer: Trainer) -> None:
        now = time.monotonic()
        due = trainer.step - self._written_step >= CHECKPOINT_STEPS
        if due and self._write_took_s < 0.1 * (now - self._written_at):
            self._restarts_without_progress = 0
            self._checkpoint(trainer)
        if self._on_step is not None:
            self._on_step()

    def _finish(self, trainer: Trainer, next_phase: str) -> None:
        self._phase = next_phase
        self._restarts_without_progress = 0
        self._checkpoint(trainer)

    def _checkpoint(self, trainer: Trainer) -> None:
        started = time.monotonic()
        saved = trainer.state()
        info = {
            "plan_sha256": self._inputs.plan_sha256,
            "phase": self._phase,
            "info": self._info,
            "meter": self._meter.to_dict(),
            "trainer": saved.info,
            "fruitless_starts": self._restarts_without_progress,
        }
        tensors = {
            **prefixed("trainer.", saved.tensors),
            **prefixed("update.", self._scores),
            **trainer.model.layout.to_tensors(),
        }
        self._resources.state_dir.write(ROUND, StateRecord(info, tensors))
        self._written_at = time.monotonic()
        self._write_took_s = self._written_at - started
        self._written_step = trainer.step


def global_adapter(
    plan: RoundPlan, blob: Mapping[str, npt.NDArray[Any]], spec: ModelSpec, source: BaseModelLoader
) -> dict[str, npt.NDArray[Any]]:
    """Return the adapter and the head from which every device starts the round, in full coordinates."""
    state = adapter_and_head(blob)
    if not plan.adapter:
        for name in module_names(spec):
            out_features, in_features = full_shape(spec, split_name(name)[1])
            state[f"{name}.lora_A"] = kaiming_uniform(plan.seed, name, plan.r, in_features)
            state[f"{name}.lora_B"] = np.zeros((out_features, plan.r), dtype=np.float32)
    if not head_tensors(state):
        state.update(source.initial_head(plan.seed))
    return state


def _tracker_of(trainer: Trainer) -> ImportanceTracker:
    assert trainer.tracker is not None  # a round always tracks importance
    return trainer.tracker


def _finite(value: float | None) -> float | None:
    """Return `value`, or None for one that is not finite or beyond the range of a report."""
    return value if value is not None and abs(value) <= MAX_FIGURE else None
