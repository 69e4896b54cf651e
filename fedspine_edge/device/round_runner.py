"""Runs the rounds of a real device: owns its data, model and durable state, and turns plans into outcomes."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fedspine_edge.clock import Clock
from fedspine_edge.config import DeviceConfig
from fedspine_edge.data.examples import split_holdout
from fedspine_edge.data.loading import read_examples
from fedspine_edge.device.cost_meter import CostMeter
from fedspine_edge.device.device_state import DEVICE, PersistedState, PruningState
from fedspine_edge.device.messaging import PlanSuperseded
from fedspine_edge.device.protocol_session import RoundOutcome
from fedspine_edge.device.round import ROUND, DeviceResources, LocalRound, RoundInputs
from fedspine_edge.errors import BlobError, FedspineError, OutOfMemory
from fedspine_edge.model.layout import Layout, full_shape, module_names, split_name
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import order_from_tensors
from fedspine_edge.protocol.messages import MAX_RANK, Ack, Report, RoundPlan, Status
from fedspine_edge.protocol.rank_slices import merge_slices
from fedspine_edge.training.base_model import BaseModelLoader, choose_torch_device
from fedspine_edge.training.memory import rank_costs
from fedspine_edge.training.peak_memory import PeakMemory
from fedspine_edge.training.state_dir import CorruptState, StateDir
from fedspine_edge.training.tokenization import TextEncoder, TokenizedSplits
from fedspine_edge.version import __version__

log = logging.getLogger("fedspine_edge.device")

MAX_INDEX_BYTES = 64 * 2**20
"""Generous size of the layout, the order and the tensor names in a round's blobs."""


class RoundRunner:
    """Implements `RoundHandler` with real training.

    Args:
        config: Settings of the device.
        clock: Clock of measured durations.
        base: Unpruned base model in memory; None loads `config.model`.
        check_messages: Called with the plan's digest after every step. Raises `PlanSuperseded` to stop the training.

    Raises:
        DataError: The data cannot be read, or does not fit the model.
        ModelError: The model cannot be loaded.
        ConfigError: Another process uses the state folder.
        CheckpointError: The state folder is damaged, or belongs to another device.
    """

    def __init__(
        self,
        config: DeviceConfig,
        clock: Clock,
        base: PrunableModel | None,
        *,
        check_messages: Callable[[str], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._check_messages = check_messages
        self._meter: CostMeter | None = None
        if config.torch_threads > 0:
            torch.set_num_threads(config.torch_threads)
        torch_device = choose_torch_device(config.torch_device)
        self._peak_memory = None if config.time_kind == "simulated" else PeakMemory(torch_device)
        examples = read_examples(config.data.path, config.data, config.task)
        train, holdout = split_holdout(examples, config.data.holdout, config.seed, where=config.data.path)
        self._num_examples = len(train)
        self.state_dir = StateDir(config.state_dir)
        try:
            self._loader = BaseModelLoader(
                config.model,
                num_labels=config.num_labels,
                task=config.task,
                torch_device=torch_device,
                base_dtype=config.base_dtype,
                model=base,
            )
            self._model: PrunableModel | None = self._loader.load()
            self.spec = self._model.spec
            head = set(self._model.head_names)
            self._head_elements: int = sum(p.numel() for n, p in self._model.module.named_parameters() if n in head)
            encoder = TextEncoder.from_model(self._model, self._loader.tokenizer())
            self._pad_id = encoder.pad_id
            self._examples = TokenizedSplits(encoder, train, holdout)
            self._max_tokens = encoder.max_length_tokens()  # until a plan sets another length
            # Reports data that the model cannot accept now, not in a round.
            self._examples.truncated_to(self._max_tokens)
            self.persisted = PersistedState.load(self.state_dir, config, self.spec)
        except BaseException:
            self.state_dir.close()
            raise

    def close(self) -> None:
        """Release the state folder."""
        self.state_dir.close()

    # RoundHandler

    def status(self, state: Literal["online", "offline"]) -> Status:
        """Return the device's status. With a memory limit it contains an estimate of the memory by rank."""
        config, costs = self._config, (0, 0)
        limit_bytes = config.memory_limit_mib * 2**20
        if limit_bytes and self._model is not None and state == "online":
            costs = rank_costs(self._model, tokens=self._max_tokens, limit_bytes=limit_bytes)
        return Status(
            device_id=config.device_id,
            state=state,
            model=self.spec,
            device_class=config.device_class,
            num_examples=self._num_examples,
            task=config.task,
            num_labels=config.num_labels,
            memory_bytes=limit_bytes,
            memory_base_bytes=costs[0],
            memory_per_rank_bytes=costs[1],
            pruning_ratio=self.persisted.pruning_state.pruning_ratio,
            version=__version__,
        )

    @property
    def max_adapter_bytes(self) -> int:
        """Size in bytes of the unpruned model's adapter at the largest rank, with the task head and the indices."""
        elements_per_rank = sum(sum(full_shape(self.spec, split_name(name)[1])) for name in module_names(self.spec))
        return 4 * (MAX_RANK * elements_per_rank + self._head_elements) + MAX_INDEX_BYTES

    def begin_round(self, plan: RoundPlan) -> None:
        """Start the cost meter. A plan of another run starts from the unpruned model."""
        if plan.run_id != self.persisted.run_id:
            self.persisted = PersistedState(PruningState(Layout.full(self.spec)), run_id=plan.run_id)
        self._max_tokens = plan.training.max_length_tokens
        self._meter = CostMeter.of(self._config, plan.server_round, self._clock)
        log.info("round %d of %d: p=%.3f, r=%d", plan.server_round, plan.num_rounds, plan.pruning_ratio, plan.r)

    def run_round(self, plan: RoundPlan, plan_sha256: str, blobs: list[bytes]) -> RoundOutcome | None:
        """Train a round. An error becomes a failed report, except a damaged state folder, which is raised."""
        assert self._meter is not None  # set by begin_round
        local_round = None
        try:
            inputs = self._inputs(plan, plan_sha256, blobs, self._meter)
            train, holdout = self._examples.truncated_to(plan.training.max_length_tokens)
            local_round = LocalRound(
                inputs,
                DeviceResources(
                    config=self._config,
                    loader=self._loader,
                    train=train,
                    holdout=holdout,
                    pad_id=self._pad_id,
                    state_dir=self.state_dir,
                    peak_memory=self._peak_memory,
                ),
                model=self._model,
                on_step=partial(self._check_messages, plan_sha256),
            )
            self._model = None  # A round that fails may leave it partly pruned.
            result = local_round.run()
        except PlanSuperseded:
            log.info("round %d: training stopped, a newer plan arrived", plan.server_round)
            self._model = None if local_round is None else local_round.model
            return None
        except CorruptState:
            raise
        except Exception as error:
            return self.fail_round(plan, plan_sha256, error)
        self._model = local_round.model
        self.persisted.pruning_state = result.pruning_state
        report = result.report
        log.info(
            "round %d: loss %s → %s, p=%.3f, %.1f s %s",
            report.server_round,
            _format_loss(report.loss_before),
            _format_loss(report.loss_after),
            report.pruning_ratio,
            report.completion_time_s,
            report.time_kind,
        )
        return RoundOutcome(report, result.update)

    def fail_round(self, plan: RoundPlan, plan_sha256: str, error: Exception) -> RoundOutcome:
        """Return a failed report of `plan`."""
        meter = self._meter
        report = Report(
            run_id=plan.run_id,
            device_id=plan.device_id,
            server_round=plan.server_round,
            plan_sha256=plan_sha256,
            status="out_of_memory" if isinstance(error, OutOfMemory) else "failed",
            reason=failure_reason(error)[:500],
            num_examples=self._num_examples,
            pruning_ratio=self.persisted.pruning_state.pruning_ratio,
            r=plan.r,
            completion_time_s=0.0 if meter is None else meter.completion_s(),
            time_kind=self._config.time_kind,
            bytes_down=0 if meter is None else meter.bytes_down,
        )
        log.error("round %d failed: %s", plan.server_round, report.reason)
        return RoundOutcome(report)

    def save_outcome(self, report: Report) -> None:
        """Save the state with the report, and delete the round's checkpoint."""
        self.persisted.report, self.persisted.acked = report, False
        self.persisted.save(self.state_dir, self._config)
        self.state_dir.remove(ROUND)

    def report_acknowledged(self, report: Report, ack: Ack) -> None:
        """Log the server's answer and save it."""
        if ack.status == "accepted" and report.status != "ok":
            log.info("round %d: the server has recorded this device's failure (%s)", ack.server_round, report.reason)
        else:
            log.info("round %d: report %s%s", ack.server_round, ack.status, f" ({ack.reason})" if ack.reason else "")
        self.persisted.acked = True
        self.persisted.save(self.state_dir, self._config)

    def lost_update(self, error: BlobError) -> Exception:
        """Return the error of a state folder whose update is missing or damaged."""
        return self.state_dir.damaged(DEVICE, f"the update of its report is missing: {error.message}")

    def finish_run(self, run_id: str) -> None:
        """Delete the checkpoint of a round that was not finished."""
        self.state_dir.remove(ROUND)

    def _inputs(self, plan: RoundPlan, plan_sha256: str, blobs: list[bytes], meter: CostMeter) -> RoundInputs:
        """Decode the round's adapter. Raises `BlobError` if it lacks groups that this device keeps."""
        slices = []
        for blob in blobs:
            tensors = codec.unpack(blob)
            codec.check_tensors(tensors, "round")
            slices.append(tensors)
        state = self.persisted.pruning_state
        if not slices:
            return RoundInputs(plan, plan_sha256, {}, None, state, meter)
        adapter, held = merge_slices(slices, self.spec)
        order = order_from_tensors(self.spec, adapter)
        if not state.initial_layout(order if plan.layout == "consensus" else None).is_within(held):
            raise BlobError(
                "the round's adapter was cut for devices that have pruned more than this one.",
                remedy="The server sends a larger one after it has received this device's status; nothing to do.",
            )
        return RoundInputs(plan, plan_sha256, adapter, order, state, meter)


def failure_reason(error: Exception) -> str:
    """Return message and remedy of this package's errors, or type and location of others. It never contains data."""
    if isinstance(error, FedspineError):
        return f"{error.message} {error.remedy}".rstrip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    # The operating system's own words, such as "No space left on device", contain no data either.
    cause = f" ({error.strerror})" if isinstance(error, OSError) and error.errno and error.strerror else ""
    return f"{type(error).__name__}{cause} at {Path(frame.filename).name}:{frame.lineno}"


def _format_loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
