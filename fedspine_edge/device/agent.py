"""The device's side of a fleet: waits for plans, fetches the adapter, trains, reports until heard.

`FleetDevice` is a state machine driven by events and time: `start`, `handle(event)`, `tick()`. A real device runs
`run()`; a simulation drives the same three calls itself. Training happens inside `handle`, as soon as a plan and
its blob are complete.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Literal

import torch

from fedspine_edge.clock import Clock, RealClock
from fedspine_edge.config import DeviceConfig
from fedspine_edge.data.examples import split
from fedspine_edge.data.loading import read
from fedspine_edge.device.adapter_download import AdapterDownload
from fedspine_edge.device.cost_meter import CostMeter
from fedspine_edge.device.device_state import DEVICE, PersistedState, PruningState, RoundResult
from fedspine_edge.device.failure_report import failure_report
from fedspine_edge.device.message_queue import MessageQueue, PlanSuperseded
from fedspine_edge.device.publisher import DevicePublisher
from fedspine_edge.device.round import ROUND, LocalRound
from fedspine_edge.device.status import status_of
from fedspine_edge.errors import BlobError, MessageError, TransportError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import (
    MAX_RETRY_S,
    Ack,
    FinishedPlan,
    Report,
    RoundPlan,
    Status,
    WaitPlan,
    retry_interval_s,
)
from fedspine_edge.protocol.rank_slices import merge_slices
from fedspine_edge.protocol.topics import BlobTopic, DeviceTopic, Topics
from fedspine_edge.training.base_model import BaseModelLoader, choose_torch_device
from fedspine_edge.training.peak_memory import PeakMemory
from fedspine_edge.training.state_dir import CorruptState, StateDir, Tensors
from fedspine_edge.training.tokenization import TextEncoder, TokenizedSplits
from fedspine_edge.transport.base import FIRST_CONNECT_TIMEOUT_S, Connected, Event, Transport, Will

log = logging.getLogger("fedspine_edge.device")


class FleetDevice:
    """One device of a fleet.

    Args:
        config: The device's settings.
        transport: Not yet connected.
        clock: Of timeouts and measured durations.
        model: An unpruned base already in memory (a simulation's devices share one); None reads `config.model`.

    Raises nothing itself; `start` checks data, model, state folder and broker, in this order.
    """

    def __init__(
        self,
        config: DeviceConfig,
        transport: Transport,
        clock: Clock | None = None,
        *,
        model: PrunableModel | None = None,
    ) -> None:
        self.config = config
        self.finished = False
        """Whether the server said that the run is over."""
        self._transport = transport
        self._clock: Clock = RealClock() if clock is None else clock
        self._base = model
        self._topics = Topics(config.fleet)
        self._state: StateDir | None = None
        self._refused_because = ""
        self._plan: RoundPlan | None = None
        self._plan_sha256 = ""
        self._meter: CostMeter | None = None
        self._retry_s = MAX_RETRY_S
        self._retry_at: float | None = None
        self._watching = False
        self._inbox = MessageQueue(transport, self._topics.plan(config.device_id))

    def start(self) -> None:
        """Load data, model and state, connect, and say hello.

        Raises `DataError`, `ModelError`, `ConfigError` (state folder in use), `BrokerUnreachable`.
        """
        config = self.config
        if config.torch_threads > 0:
            torch.set_num_threads(config.torch_threads)
        torch_device = choose_torch_device(config.torch_device)
        self._peak = None if config.time_kind == "simulated" else PeakMemory(torch_device)
        examples = read(config.data.path, config.data, config.task)
        self._train, self._holdout = split(examples, config.data.holdout, config.seed, where=config.data.path)
        self._state = StateDir(config.state_dir)
        self._blobs = BlobStore(self._state.folder / "blobs")
        try:
            self._source = BaseModelLoader(
                config.model,
                num_labels=config.num_labels,
                task=config.task,
                torch_device=torch_device,
                base_dtype=config.base_dtype,
                model=self._base,
            )
            self._model: PrunableModel | None = self._source.load()
            self._spec = self._model.spec
            self._texts = TextEncoder.from_model(self._model, self._source.tokenizer())
            self._examples = TokenizedSplits(self._texts, self._train, self._holdout)
            self._longest_tokens = self._texts.max_length_tokens()  # until a plan asks for another length
            self._examples.truncated_to(self._longest_tokens)  # what does not fit the model is told now, not in a round
            self._record = PersistedState.load(self._state, config, self._spec)
            self._retry_at = None if self._record.acked else self._clock.now()
            self._outbox = DevicePublisher(self._transport, self._topics, config.device_id, self._blobs)
            self._fetch = AdapterDownload(self._transport, self._topics, self._state.folder / "download")
            will = Will(self._topics.status(config.device_id), codec.encode(self._status("offline")))
            self._transport.connect(timeout_s=min(FIRST_CONNECT_TIMEOUT_S, config.reconnect_timeout_s), will=will)
            self._transport.subscribe(*self._topics.device_filters(config.device_id))
            self._say_hello()
        except BaseException:
            self._state.close()
            raise

    def run(self, until: float | None = None) -> int:
        """Take part until the run is finished; returns 0, or 1 when the clock reached `until` (seconds) first.

        Raises as `start` does, `CheckpointError` for a damaged state folder, and `BrokerUnreachable` after
        `reconnect_timeout_s` without a broker. Can be interrupted at any moment and started again.
        """
        self.start()
        self._watching = True
        try:
            while not self.finished:
                now = self._clock.now()
                if until is not None and now >= until:
                    return 1
                wake = self.next_wakeup()
                timeout_s = min(1.0, max(0.0, (wake if wake is not None else now + 1.0) - now))
                event = self._inbox.receive(timeout_s)
                if event is not None:
                    self.handle(event)
                self.tick()
            return 0
        finally:
            self.close()

    def close(self) -> None:
        """Say goodbye, disconnect, release the state folder. Harmless when repeated."""
        state, self._state = self._state, None
        if state is None:
            return
        try:
            self._transport.publish(
                self._topics.status(self.config.device_id), codec.encode(self._status("offline")), retain=True
            )
            self._transport.close()
        except TransportError as error:
            log.warning("closing without a goodbye: %s", error.message)
        finally:
            state.close()

    def handle(self, event: Event) -> None:
        """React to one event of the transport; trains when a plan is complete."""
        if isinstance(event, Connected):
            self._say_hello()
            self._resend()
            return
        try:
            topic = self._topics.parse(event.topic)
            if isinstance(topic, BlobTopic):
                self._on_chunk(topic, event.payload)
            elif isinstance(topic, DeviceTopic) and topic.device_id == self.config.device_id and event.payload:
                if topic.kind == "plan":
                    self._on_plan(event.payload)
                elif topic.kind == "ack":
                    self._on_ack(codec.decode(event.payload, Ack))
        except MessageError as error:
            log.warning("ignored a message on %s: %s", event.topic, error.message)

    def tick(self) -> None:
        """Do what time demands: ask again for chunks, send a report again."""
        if self._retry_at is not None and self._clock.now() >= self._retry_at:
            self._resend()

    def next_wakeup(self) -> float | None:
        """When `tick` has something to do, in the clock's seconds; None if only an event can change anything."""
        return self._retry_at

    # Plans and chunks

    def _on_plan(self, payload: bytes) -> None:
        sha256 = codec.digest(payload)
        if self._plan is not None and sha256 == self._plan_sha256:
            return
        plan = codec.decode_plan(payload)
        if plan.device_id != self.config.device_id:
            raise MessageError(f"the plan is for device {plan.device_id!r}.")
        record, last = self._record, self._record.report
        if last is not None and last.run_id == plan.run_id and last.plan_sha256 == sha256:
            self._drop_plan()
            record.acked = False
            self._resend()
            return
        same_run = last is not None and last.run_id == plan.run_id
        if last is not None and same_run and isinstance(plan, RoundPlan) and plan.server_round < last.server_round:
            raise MessageError(f"round {plan.server_round} is over; this device reported {last.server_round}.")
        self._drop_plan()
        record.acked, self._retry_at = True, None  # a newer plan ends the wait for an ack
        reason = plan.reason if isinstance(plan, WaitPlan) else ""
        if reason and reason != self._refused_because:  # the server answers every status with it
            log.error("fleet %s does not accept this device: %s", self.config.fleet, reason)
        self._refused_because = reason
        if isinstance(plan, FinishedPlan):
            log.info("run %s is finished", plan.run_id)
            self._state_dir.remove(ROUND)
            self.finished = True
        elif isinstance(plan, RoundPlan):
            self._accept(plan, sha256)

    def _accept(self, plan: RoundPlan, sha256: str) -> None:
        config = self.config
        if plan.run_id != self._record.run_id:
            self._record = PersistedState(PruningState(Layout.full(self._spec)), run_id=plan.run_id)
        self._plan, self._plan_sha256 = plan, sha256
        self._longest_tokens = plan.training.max_length_tokens
        self._retry_s = retry_interval_s(plan.deadline_s)
        self._meter = CostMeter.of(config, plan.server_round, self._clock)
        log.info("round %d of %d: p=%.3f, r=%d", plan.server_round, plan.num_rounds, plan.pruning_ratio, plan.r)
        if plan.adapter:
            self._fetch.begin(plan.adapter)
            self._ask()
        self._proceed(plan)

    def _on_chunk(self, topic: BlobTopic, payload: bytes) -> None:
        if self._plan is not None and self._fetch.feed(topic.sha256, topic.index, payload):
            self._retry_at = self._clock.now() + self._retry_s
            self._proceed(self._plan)

    def _proceed(self, plan: RoundPlan) -> None:
        """Train as soon as all of the adapter that this device needs is here."""
        if self._fetch.pending:
            return
        tensors: Tensors | None = {}
        if plan.adapter:
            try:
                bands = self._fetch.take()
                tensors = None if bands is None else self._joined(plan, bands)
            except BlobError as error:
                self._fetch.discard()
                self._conclude(self._failure(plan, error), None)
                return
        if tensors is not None:
            self._retry_at = None
            self._train_round(plan, tensors)

    def _joined(self, plan: RoundPlan, bands: list[Tensors]) -> Tensors:
        """The adapter of `bands`. Raises `BlobError` when it lacks what this device keeps."""
        tensors, held = merge_slices(bands, self._spec)
        order = order_from_tensors(self._spec, tensors) if plan.layout == "consensus" else None
        if not self._record.standing.starts_at(order).is_within(held):
            raise BlobError(
                "the round's adapter was cut for devices that have pruned more than this one.",
                remedy="The server sends more once it has heard this device's status; no action is needed.",
            )
        return tensors

    def _ask(self) -> None:
        self._retry_at = self._clock.now() + self._retry_s
        self._fetch.ask()

    def _drop_plan(self) -> None:
        self._fetch.stop()
        self._plan, self._plan_sha256 = None, ""

    # Training

    def _train_round(self, plan: RoundPlan, tensors: Tensors) -> None:
        assert self._meter is not None  # set with the plan
        job = None
        try:
            train, holdout = self._examples.truncated_to(plan.training.max_length_tokens)
            job = LocalRound(
                plan,
                self._plan_sha256,
                tensors,
                config=self.config,
                source=self._source,
                standing=self._record.standing,
                train=train,
                holdout=holdout,
                pad_id=self._texts.pad_id,
                state=self._state_dir,
                meter=self._meter,
                peak=self._peak,
                model=self._model,
                on_step=partial(self._inbox.watch, self._plan_sha256) if self._watching else None,
            )
            self._model = None  # a round that failed may leave it half pruned
            outcome = job.run()
        except PlanSuperseded:
            log.info("round %d: a newer plan arrived, training abandoned", plan.server_round)
            self._model = None if job is None else job.model
            self._drop_plan()
            return
        except CorruptState:
            raise
        except Exception as error:
            self._conclude(self._failure(plan, error), None)
            return
        self._model = job.model
        self._conclude(outcome.report, outcome)

    def _failure(self, plan: RoundPlan, error: Exception) -> Report:
        report = failure_report(
            plan,
            self._plan_sha256,
            error,
            num_examples=len(self._train),
            pruning_ratio=self._record.standing.pruning_ratio,
            time_kind=self.config.time_kind,
            meter=self._meter,
        )
        log.error("round %d failed: %s", plan.server_round, report.reason)
        return report

    # Reports

    def _conclude(self, report: Report, outcome: RoundResult | None) -> None:
        """Make the report durable, then send it."""
        state = self._state_dir
        self._clock.spend(0.0 if report.time_kind == "measured" else report.completion_time_s)
        if outcome is not None:
            self._blobs.put(outcome.update)
            self._record.standing = outcome.standing
            losses = ("none" if x is None else f"{x:.4f}" for x in (report.loss_before, report.loss_after))
            log.info(
                "round %d: loss %s → %s, p=%.3f, %.1f s %s",
                *(report.server_round, *losses),
                *(report.pruning_ratio, report.completion_time_s, report.time_kind),
            )
        self._record.report, self._record.acked = report, False
        self._record.save(state, self.config)
        state.remove(ROUND)
        self._blobs.prune([] if report.update is None else [report.update.sha256])
        self._fetch.discard()
        self._drop_plan()
        if outcome is not None:
            self._say_hello()
        self._send_report(report)
        if report.update is not None:
            self._send_chunks(report, range(report.update.num_chunks))

    def _on_ack(self, ack: Ack) -> None:
        report = self._record.report
        if report is None or self._record.acked:
            return
        if (ack.run_id, ack.server_round) != (report.run_id, report.server_round):
            return
        if ack.status == "incomplete":
            self._send_chunks(report, ack.missing)
            return
        if ack.status == "accepted" and report.status != "ok":
            log.info("round %d: the server knows that this device failed (%s)", ack.server_round, report.reason)
        else:
            log.info("round %d: report %s%s", ack.server_round, ack.status, f" ({ack.reason})" if ack.reason else "")
        self._record.acked, self._retry_at = True, None
        self._record.save(self._state_dir, self.config)

    def _resend(self) -> None:
        """Ask again for missing chunks, or restate the report until there is a final ack."""
        self._retry_at = None
        if self._plan is not None and self._fetch.pending:
            self._ask()
        elif self._record.report is not None and not self._record.acked:
            self._send_report(self._record.report)

    def _send_report(self, report: Report) -> None:
        self._retry_at = self._clock.now() + self._retry_s
        self._outbox.report(report)

    def _send_chunks(self, report: Report, indices: range | tuple[int, ...]) -> None:
        try:
            self._outbox.chunks(report, indices)
        except BlobError as error:
            raise self._state_dir.damaged(DEVICE, f"the update it announces is gone: {error.message}") from error

    def _say_hello(self) -> None:
        self._outbox.status(self._status("online"))

    def _status(self, state: Literal["online", "offline"]) -> Status:
        return status_of(
            *(self.config, self._record, state),
            num_examples=len(self._train),
            model=self._model,
            longest_tokens=self._longest_tokens,
        )

    @property
    def _state_dir(self) -> StateDir:
        assert self._state is not None  # only after start and before close
        return self._state
