"""The fleet server: runs the rounds of a fleet. `FleetServer._run_round` is one round from top to bottom.

The server may be killed at any moment. It journals whatever it tells a device before it sends it, so after a restart
with the same command it publishes the same plans, keeps the reports it has, and ends with the same adapter. During a
round that is not resumed the journal is only written; plans, reports and tensors are passed as objects. The server
waits only in `MessageDispatcher.process_next` and reads only the clock it was given, so the same code runs in virtual
time.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from fedspine_edge.clock import Clock, RealClock
from fedspine_edge.config import FleetConfig, required_devices
from fedspine_edge.errors import FedspineError
from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import order_from_tensors
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import BlobRef, Report, retry_interval_s
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.server import round_results
from fedspine_edge.server.adapter_store import AdapterStore, Blob
from fedspine_edge.server.aggregate_round import aggregate_updates, initial_tensors
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.dispatcher import MessageDispatcher
from fedspine_edge.server.final_artifacts import FinishedRun, RunResult, write_final
from fedspine_edge.server.journal.schema import ClosedRound, IssuedPlan, RunState
from fedspine_edge.server.open_round import OpenRound
from fedspine_edge.server.planning import build_finished_plan, build_round_plan, build_wait_plan, device_info
from fedspine_edge.server.publisher import ServerPublisher
from fedspine_edge.server.report_collector import ReportCollector
from fedspine_edge.server.run_context import RunContext
from fedspine_edge.server.run_dir import RunDir, settings
from fedspine_edge.server.update_validation import ValidationRules, head_shapes, load_accepted_update
from fedspine_edge.strategies import RoundOutcome, create
from fedspine_edge.transport.base import FIRST_CONNECT_TIMEOUT_S, LONGEST_PAUSE_S, Transport

logger = logging.getLogger(__name__)

__all__ = ["FleetServer", "RunResult"]


class FleetServer:
    """The server of one run of one fleet.

    Args:
        config: Settings of the fleet; `run_dir` contains everything that the run needs to continue.
        transport: Transport that is not connected yet; it is closed when `run` returns.
        clock: Clock for waiting and deadlines; None for real time.
        on_event: Called with a name and plain data when something happens (round_opened, report, round_closed,
            finished), for progress displays; must not block.
    """

    def __init__(
        self,
        config: FleetConfig,
        transport: Transport,
        clock: Clock | None = None,
        *,
        on_event: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.config = config
        self._clock: Clock = RealClock() if clock is None else clock
        # A real deadline continues while the server is down, so it is measured in wall time.
        self._wall_time = time.time if isinstance(self._clock, RealClock) else self._clock.now
        self._on_event = on_event or (lambda name, data: None)
        self._topics = Topics(config.fleet)
        self._publisher = ServerPublisher(transport, self._topics)
        self._strategy = create(config)
        self._retry_s = retry_interval_s(config.deadline_s)
        self._state = RunState()
        self._final_layout: Layout | None = None

    def run(self) -> RunResult:
        """Run, or continue, until all rounds are done.

        Raises:
            ConfigError: `run_dir` belongs to another run or program, or too few devices came within `join_timeout_s`.
            FedspineError: `max_failed_rounds` attempts failed in a row, or `run_dir` cannot be written (a full disk);
                starting again continues.
            BrokerUnreachable: The broker cannot be reached.
        """
        self._run_dir = RunDir(self.config)
        self._journal = self._run_dir.journal
        try:
            result = self._journal.meta("result")
            if result is not None:
                logger.info("the run in %s is already finished", self._run_dir.path)
                return msgspec.json.decode(result, type=RunResult)
            self._start_or_resume()
            self._connect()
            while self._state.server_round <= self.config.num_rounds:
                self._run_round()
            return self._finish()
        except (FedspineError, KeyboardInterrupt) as error:
            with suppress(sqlite3.Error):  # the disk may be full
                self._journal.set_meta(stopped=str(error) or "It was interrupted.")  # shown by `fedspine-edge status`
            raise
        except (sqlite3.Error, OSError) as error:
            raise FedspineError(
                f"run_dir {self._run_dir.path} cannot be written: {error}.",
                remedy="Free space on its disk or correct its permissions, then start the server again with the same "
                "command: the run continues.",
            ) from error
        finally:
            self._publisher.close()
            self._run_dir.close()

    # The round

    def _run_round(self) -> None:
        if self._state.open:
            opened, slices = self._resume_round()
        else:
            self._wait_for_devices()
            opened, slices = self._open_round()
        collector = ReportCollector(self._run, opened, self._registry)
        self._registry.start_round()
        self._publish_round(opened, slices)
        self._collect(collector)
        reports = collector.accepted_reports()
        if len(reports) < self.config.min_reports:
            self._repeat_round(collector, reports)
        else:
            self._commit_round(collector, reports)
        if self._state.server_round > opened.server_round:  # a repeated round may publish the same blobs again
            self._clear_published()

    def _wait_for_devices(self) -> None:
        """Wait until enough devices are online. Raises `ConfigError` at the join timeout."""
        state, config = self._state, self.config
        is_first = (state.server_round, state.attempt) == (1, 1)
        needed = required_devices(config.min_reports, config.min_devices, first_attempt=is_first)
        until = self._clock.now() + config.join_timeout_s
        logged, published_for = -1, set[str]()
        while self._registry.num_online < needed:
            if self._registry.num_online != logged:
                logged = self._registry.num_online
                logger.info("waiting for devices: %d of %d online", logged, needed)
            if is_first and published_for != (offline := set(self._registry.offline())):
                published_for = offline
                # Otherwise a retained `finished` plan of an earlier run would make them exit.
                self._publisher.publish_plans(self._wait_plans())
            remaining = until - self._clock.now()
            if remaining <= 0:
                raise self._registry.join_timeout_error(needed, config.join_timeout_s)
            self._dispatcher.process_next(remaining)

    def _open_round(self) -> tuple[OpenRound, list[Blob]]:
        """Let the strategy assign the online devices, and journal their plans."""
        config, registry, state = self.config, self._registry, self._state
        self._dispatcher.announce_rejections(registry.decide_model())
        reported = self._dispatcher.reported
        infos = [device_info(registry[i].status, i in reported, config.ranks) for i in registry.online()]
        assignments = self._strategy.assign(infos, state.server_round)
        adapter = state.adapter or self._adapters.put(initial_tensors(config, registry.spec))
        slices = self._adapters.slice_for_devices(adapter, assignments, registry.layouts(), registry.spec)
        refs = [ref for ref, _ in slices]
        plans = {
            device_id: IssuedPlan.from_plan(
                build_round_plan(config, self._run.run_id, state, device_id, assignment, refs),
                u=assignment.u,
                explain=self._strategy.explain(device_id),
            )
            for device_id, assignment in sorted(assignments.items())
        }
        self._state = replace(state, strategy=self._strategy.to_dict(), adapter=adapter, open=True)
        self._journal.open_round(
            self._state,
            list(plans.values()),
            published=refs,
            wall_s=self._wall_time(),
            spec=_json(registry.spec),
            num_labels=str(registry.num_labels),
        )
        logger.info("round %d of %d: %d devices", state.server_round, config.num_rounds, len(plans))
        self._on_event("round_opened", {"server_round": state.server_round, "devices": sorted(assignments)})
        return self._opened(plans, adapter), slices

    def _resume_round(self) -> tuple[OpenRound, list[Blob]]:
        """Read the plans of the open round from the journal and its slices from the run folder."""
        state = self._state
        plans = {p.plan.device_id: p for p in self._journal.plans(state.server_round, state.attempt)}
        assert state.adapter is not None  # journaled with the plans
        opened = self._opened(plans, state.adapter, resumed=True)
        return opened, self._adapters.load_slices(issued.plan for issued in plans.values())

    def _opened(self, plans: Mapping[str, IssuedPlan], adapter: BlobRef, *, resumed: bool = False) -> OpenRound:
        spec, tensors = self._registry.spec, self._adapters.load(adapter)
        # A language model keeps its own head. The head of another task becomes known with the first aggregate.
        head_is_known = self._state.server_round > 1 or self.config.task == "causal_lm"
        rules = ValidationRules(
            spec,
            self.config,
            order_from_tensors(spec, tensors),
            head_shapes(tensors) if head_is_known else None,
        )
        return OpenRound(self._state.server_round, self._state.attempt, plans, tensors, rules, resumed)

    def _publish_round(self, opened: OpenRound, slices: list[Blob]) -> None:
        """Publish chunks and plans, and `wait` for offline devices, which would otherwise follow an older plan."""
        plans = {device_id: issued.payload for device_id, issued in opened.plans.items()}
        self._publisher.publish_plans({**self._wait_plans(), **plans}, slices)

    def _collect(self, collector: ReportCollector) -> None:
        """Process messages until all participants have reported or the deadline has passed."""
        config, opened = self.config, collector.round
        started = self._journal.started_wall_s(opened.server_round, opened.attempt)
        remaining = config.deadline_s - max(0.0, self._wall_time() - started)
        if opened.resumed:
            # Devices may have finished while the server was down; they repeat their report within one interval.
            remaining = max(remaining, min(config.deadline_s, 2 * self._retry_s))
        until = self._clock.now() + remaining
        while not collector.complete and (left := until - self._clock.now()) > 0:
            self._dispatcher.process_next(left, collector)
        if not collector.complete:
            missing = ", ".join(collector.waiting_for[:10])
            logger.warning("round %d: deadline passed without %s", opened.server_round, missing)

    def _commit_round(self, collector: ReportCollector, reports: dict[str, Report]) -> None:
        """Aggregate the updates into what the next round starts from."""
        opened, spec = collector.round, self._registry.spec
        result = aggregate_updates(
            [(report, partial(load_accepted_update, self._run.blobs, report, spec)) for report in reports.values()],
            rule=self._strategy.aggregation,
            config=self.config,
            spec=spec,
            order=opened.rules.order,
            layouts=self._registry.layouts(),
            sent=opened.tensors,
        )
        for device_id, scale in sorted(result.aggregate.clipped.items()):
            logger.warning("round %d: update of %s scaled to %.3f", opened.server_round, device_id, scale)
        next_state = RunState(opened.server_round + 1, adapter=self._adapters.put(result.tensors))
        if next_state.server_round > self.config.num_rounds:
            self._final_layout = round_results.final_layout(self.config, result.layouts, reports, result.scores)
        layouts = {i: (layout, reports[i].pruning_ratio) for i, layout in result.layouts.items()}
        self._close_round(
            collector,
            reports.values(),
            next_state,
            layouts=layouts,
            explained_variance=result.aggregate.explained_variance,
            final_layout=self._final_layout,
        )
        for device_id, (layout, ratio) in layouts.items():
            self._registry.set_layout(device_id, layout, ratio)

    def _repeat_round(self, collector: ReportCollector, reports: dict[str, Report]) -> None:
        """End an attempt with too few reports, and try the same round again."""
        state, needed = self._state, self.config.min_reports
        next_state = replace(state, attempt=state.attempt + 1, failures=state.failures + 1)
        outcomes = self._close_round(collector, reports.values(), next_state)
        text = (
            f"round {collector.round.server_round}: {len(reports)} of {len(collector.round.plans)} reports were "
            "accepted"
        )
        logger.warning("%s, %d are needed", text, needed)
        if next_state.failures >= self.config.max_failed_rounds:
            reasons = [f"{o.device_id} {o.status}{f' ({o.reason})' if o.reason else ''}" for o in outcomes]
            raise FedspineError(
                f"{text}, {needed} are needed; {next_state.failures} attempts failed in a row: "
                f"{'; '.join(reasons[:5])}.",
                remedy="Check the devices' logs, or raise deadline_s. Start the server again to continue.",
            )

    def _close_round(
        self, collector: ReportCollector, reports: Iterable[Report], next_state: RunState, **changes: Any
    ) -> list[RoundOutcome]:
        """Let the strategy learn from the round, then journal its end in one transaction.

        Args:
            collector: The round with its reports.
            reports: The accepted reports.
            next_state: The state to continue with, without the strategy's.
            changes: Further fields of the `ClosedRound`.
        """
        opened = collector.round
        outcomes = round_results.build_outcomes(collector, set(self._registry.online()))
        terms = self._strategy.observe(outcomes, opened.server_round)
        mean_loss, mean_accuracy = round_results.means(reports)
        received = [recorded.report for recorded in collector.recorded.values()]
        closed = ClosedRound(
            server_round=opened.server_round,
            attempt=opened.attempt,
            done=next_state.server_round > opened.server_round,
            outcomes=[(outcome, terms.get(outcome.device_id)) for outcome in outcomes],
            mean_loss=mean_loss,
            mean_accuracy=mean_accuracy,
            bytes_up=sum(report.bytes_up for report in received),
            bytes_down=sum(report.bytes_down for report in received),
            **changes,
        )
        self._state = replace(next_state, strategy=self._strategy.to_dict(), open=False)
        self._journal.close_round(self._state, closed, wall_s=self._wall_time())
        for device_id in self._registry.end_round(collector.waiting_for):
            logger.warning("%s has sent nothing for several rounds and is not waited for until it does", device_id)
        accepted = [outcome.device_id for outcome in outcomes if outcome.status == "ok"]
        self._on_event("round_closed", {"server_round": opened.server_round, "done": closed.done, "accepted": accepted})
        return outcomes

    def _finish(self) -> RunResult:
        """Write the final files, publish `finished` to all devices, then mark the run as finished."""
        journal, registry, config = self._journal, self._registry, self.config
        layout = self._final_layout or journal.final_layout(registry.spec)
        assert layout is not None  # journaled with the last round
        assert self._state.adapter is not None  # likewise
        rounds = journal.rounds()
        reports = round_results.accepted_reports(journal, {view.server_round: view.attempt for view in rounds})
        trained_examples, trained_steps = round_results.trained_amounts(reports)
        result = write_final(
            self._run_dir.path,
            FinishedRun(
                run_id=self._run.run_id,
                config=config,
                tensors=self._adapters.load(self._state.adapter),
                layout=layout,
                device_layouts={i: kept for i, kept in registry.layouts().items() if i in reports[config.num_rounds]},
                rounds=rounds,
                num_labels=registry.num_labels,
                trained_examples=trained_examples,
                trained_steps=trained_steps,
            ),
        )
        self._clear_published()
        run_id = self._run.run_id
        self._publisher.publish_plans(
            {i: codec.encode(build_finished_plan(config, run_id, i)) for i in registry.all_ids()}
        )
        until = self._clock.now() + config.deadline_s
        while self._publisher.has_unsent and (left := until - self._clock.now()) > 0:
            self._dispatcher.process_next(left)
        # Devices exit on `finished`, so the run is marked as finished only after it has been published.
        self._publisher.close()
        journal.set_meta(result=json.dumps(result.to_dict()))
        logger.info("run %s is finished: %s", run_id, result.final_dir)
        self._on_event("finished", result.to_dict())
        return result

    def _wait_plans(self) -> dict[str, bytes]:
        """Return an encoded `wait` plan for every offline device."""
        number = self._state.server_round
        return {
            i: codec.encode(build_wait_plan(self.config, self._run.run_id, number, i)) for i in self._registry.offline()
        }

    def _clear_published(self) -> None:
        """Remove the chunks of all earlier rounds from the broker."""
        for ref in self._journal.published():
            if self._publisher.clear(ref):
                self._journal.forget_published(ref.sha256)

    # Start

    def _start_or_resume(self) -> None:
        """Restore the state from the journal, or start a new run."""
        journal, config = self._journal, self.config
        is_real = isinstance(self._clock, RealClock)
        run_id = journal.meta("run_id")
        if run_id is None:
            run_id = secrets.token_hex(8) if is_real else _virtual_run_id(config)
        journal.set_meta(run_id=run_id, config=_json(config), clock="real" if is_real else "virtual", stopped="")
        blobs = BlobStore(self._run_dir.path / "blobs")
        self._adapters = AdapterStore(blobs, config)
        self._run = RunContext(run_id, config, self._run_dir.path, journal, blobs, self._wall_time, self._on_event)
        # An operator who starts the server again after failed rounds gets the full number of attempts.
        self._state = replace(journal.state(), failures=0)
        if self._state.strategy is not None:
            self._strategy.load_dict(self._state.strategy)
            logger.info("run %s continues with round %d", run_id, self._state.server_round)
        self._registry = DeviceRegistry(
            config.base_sha256,
            task=config.task,
            spec=journal.spec,
            num_labels=int(journal.meta("num_labels") or 0),
            r_max=max(config.ranks),
        )
        self._expected: set[str] = set()
        layouts = {} if journal.spec is None else journal.layouts(journal.spec)
        for status, was_online, _ in journal.devices():
            self._registry.restore(status, layouts.get(status.device_id))
            if was_online and not self._registry.rejection(status.device_id):
                self._expected.add(status.device_id)
        self._dispatcher = MessageDispatcher(self._run, self._publisher, self._topics, self._registry, self._retry_s)

    def _connect(self) -> None:
        """Connect and, in a resumed run, give the devices that were online time to publish their status again.

        If the broker went down together with the server, devices pause before they try to reconnect.
        """
        self._publisher.open(min(FIRST_CONNECT_TIMEOUT_S, self.config.join_timeout_s, self.config.deadline_s))
        until = self._clock.now() + self._retry_s + min(LONGEST_PAUSE_S, self.config.deadline_s)
        while not (self._publisher.connected and self._dispatcher.seen >= self._expected):
            left = until - self._clock.now()
            if left <= 0:
                break
            self._dispatcher.process_next(left)


def _json(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _virtual_run_id(config: FleetConfig) -> str:
    """Return the same id for the same settings, since devices derive seeds from it."""
    return codec.digest(json.dumps(settings(msgspec.to_builtins(config)), sort_keys=True).encode())[:16]
