"""The server: runs the rounds of a fleet. `FleetServer._run_round` is the round, top to bottom.

The server may be killed at any moment. Whatever it told anyone was journaled before, so a restart of the same
command re-publishes the same plans, keeps the reports it has, and ends with the same adapter. It waits only inside
`MessageDispatcher.wait` and measures with the clock it was given, so the same code runs in virtual time.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from fedspine_edge.clock import Clock, RealClock
from fedspine_edge.config import FleetConfig, required_devices
from fedspine_edge.errors import FedspineError
from fedspine_edge.model.layout import Layout
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.messages import BlobRef, FinishedPlan, Report, WaitPlan, retry_interval_s
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.server import round_results
from fedspine_edge.server.adapter_store import AdapterStore
from fedspine_edge.server.aggregate_round import aggregate_updates
from fedspine_edge.server.device_registry import DeviceRegistry
from fedspine_edge.server.dispatcher import MessageDispatcher
from fedspine_edge.server.final_artifacts import RunResult, write_final
from fedspine_edge.server.journal.schema import OutcomeRow, PlanRow, RunState
from fedspine_edge.server.planning import build_idle_plan, build_round_plan, device_info
from fedspine_edge.server.publisher import ServerPublisher
from fedspine_edge.server.rejected_updates import RejectedUpdates
from fedspine_edge.server.report_collector import ReportCollector
from fedspine_edge.server.round_context import RoundContext
from fedspine_edge.server.run_dir import RunDir, settings
from fedspine_edge.strategies import Assignment, create
from fedspine_edge.transport.base import FIRST_CONNECT_TIMEOUT_S, LONGEST_PAUSE_S, Transport

logger = logging.getLogger(__name__)

__all__ = ["FleetServer", "RunResult"]


class FleetServer:
    """The coordinator of one run of one fleet.

    Args:
        config: The fleet's settings; `run_dir` holds everything the run needs to continue.
        transport: Not yet connected; closed when `run` returns.
        clock: Of waiting and deadlines.
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
        # Real deadlines go on while the server is down; virtual time has no other clock.
        self._wall = time.time if isinstance(self._clock, RealClock) else self._clock.now
        self._tell = on_event or (lambda name, data: None)
        self._topics = Topics(config.fleet)
        self._post = ServerPublisher(transport, self._topics)
        self._strategy = create(config)
        self._retry_s = retry_interval_s(config.deadline_s)
        self._members = DeviceRegistry(config.base_sha256, task=config.task)
        self._state = RunState()

    def run(self) -> RunResult:
        """Run, or continue, until all rounds are done.

        Raises:
            ConfigError: `run_dir` belongs to something else, or too few devices came within `join_timeout_s`.
            FedspineError: `max_failed_rounds` rounds failed in a row; starting again continues.
            BrokerUnreachable: no broker.
        """
        self._dir = RunDir(self.config)
        self._journal = self._dir.journal
        try:
            result = self._journal.meta("result")
            if result is not None:
                logger.info("the run in %s is already finished", self._dir.path)
                return RunResult(**json.loads(result))
            self._begin()
            self._connect()
            while self._state.server_round <= self.config.num_rounds:
                self._run_round()
            return self._finish()
        except (FedspineError, KeyboardInterrupt) as error:
            self._journal.set_meta(stopped=str(error) or "It was interrupted.")  # for who asks later
            raise
        finally:
            self._post.close()
            self._dir.close()

    # The round

    def _run_round(self) -> None:
        resumed = self._state.open
        if not resumed:
            self._wait_for_devices()
            self._open_round()
        self._hearing.context = context = self._new_context()
        self._hearing.collector = collector = self._new_collector(context, resumed)
        self._announce(collector)
        self._collect(collector, resumed)
        self._hearing.collector = self._hearing.context = None
        reports = context.agreed(self._journal, collector)
        if len(reports) < self.config.min_reports:
            self._repeat_round(collector, reports)
        else:
            self._commit_round(context, collector, reports)
        if self._state.server_round > collector.server_round:  # a repeated round may send the same again
            self._adapters.clear()

    def _wait_for_devices(self) -> None:
        """Until enough devices are online. Raises `ConfigError` at the join timeout."""
        state, config = self._state, self.config
        first = (state.server_round, state.attempt) == (1, 1)
        needed = required_devices(config.min_reports, config.min_devices, first_attempt=first)
        until = self._clock.now() + config.join_timeout_s
        said, called = -1, set[str]()
        while self._members.num_online < needed:
            if self._members.num_online != said:
                said = self._members.num_online
                logger.info("waiting for devices: %d of %d online", said, needed)
            if first and called != (away := set(self._members.offline())):
                called = away
                self._post.announce(self._waits())  # else they would obey the end of an earlier run, and leave again
            remaining = until - self._clock.now()
            if remaining <= 0:
                raise self._members.too_few(needed, config.join_timeout_s)
            self._hearing.wait(remaining)

    def _open_round(self) -> None:
        """Ask the strategy, journal its plans."""
        config, members = self.config, self._members
        spec = members.spec
        assert spec is not None  # set by the first device that is online
        reported, ranks = self._hearing.reported, config.ranks
        infos = [device_info(members[i].status, i in reported, ranks) for i in members.online()]
        assignments = self._strategy.assign(infos, self._state.server_round)
        blob = self._state.blob or self._adapters.first(spec)
        bands = self._adapters.slice_for_devices(blob, assignments, spec)
        plans = [self._plan(i, assignment, bands) for i, assignment in sorted(assignments.items())]
        self._state = replace(self._state, strategy=self._strategy.to_dict(), blob=blob, open=True)
        self._journal.open_round(
            self._state,
            plans,
            published=bands,
            wall_s=self._wall(),
            spec=_json(spec),
            num_labels=str(members.num_labels),
        )
        logger.info("round %d of %d: %d devices", self._state.server_round, config.num_rounds, len(plans))
        self._tell("round_opened", {"server_round": self._state.server_round, "devices": sorted(assignments)})

    def _collect(self, collector: ReportCollector, resumed: bool) -> None:
        """Take reports and uploads until all have answered or the deadline has passed."""
        config = self.config
        started = self._journal.started_wall_s(collector.server_round, collector.attempt)
        remaining = config.deadline_s - max(0.0, self._wall() - started)
        if resumed:
            # Devices may have finished while the server was down; they repeat their report within one interval.
            remaining = max(remaining, min(config.deadline_s, 2 * self._retry_s))
        until = self._clock.now() + remaining
        while not collector.complete and (left := until - self._clock.now()) > 0:
            self._hearing.wait(left)
        if not collector.complete:
            logger.warning(
                "round %d: deadline passed without %s", collector.server_round, ", ".join(collector.waiting_for[:10])
            )

    def _commit_round(self, context: RoundContext, collector: ReportCollector, reports: dict[str, Report]) -> None:
        """Aggregate, and make the result what the next round starts from."""
        folded = aggregate_updates(
            [(report, partial(context.load, report, collector.plans[i])) for i, report in reports.items()],
            rule=self._strategy.aggregation,
            config=self.config,
            spec=context.spec,
            order=context.order,
            layouts=context.layouts,
            sent=context.sent,
        )
        for device_id, share in sorted(folded.aggregate.clipped.items()):
            logger.warning("round %d: update of %s scaled to %.3f", collector.server_round, device_id, share)
        following = RunState(collector.server_round + 1, blob=self._adapters.keep(folded.tensors))
        meta = {}
        if following.server_round > self.config.num_rounds:
            layout = round_results.final_layout(self.config, folded.kept, reports, folded.scores)
            meta["layout"] = json.dumps(layout.to_dict(), separators=(",", ":"))
        self._close_round(
            collector,
            reports,
            following,
            layouts={i: (kept, reports[i].pruning_ratio) for i, kept in folded.kept.items()},
            energy={name: list(share) for name, share in folded.aggregate.energy.items()},
            **meta,
        )

    def _repeat_round(self, collector: ReportCollector, reports: dict[str, Report]) -> None:
        """Too few reports: learn what there is to learn, and try the same round again."""
        state, needed = self._state, self.config.min_reports
        following = replace(state, attempt=state.attempt + 1, failures=state.failures + 1)
        ended = self._close_round(collector, reports, following, layouts={}, energy={})
        text = f"round {collector.server_round}: {len(reports)} of {len(collector.plans)} reports were accepted"
        logger.warning("%s, %d are needed", text, needed)
        if following.failures >= self.config.max_failed_rounds:
            why = [f"{row.device_id} {row.status}{f' ({row.reason})' if row.reason else ''}" for row in ended]
            raise FedspineError(
                f"{text}, {needed} are needed; {following.failures} attempts failed in a row: {'; '.join(why[:5])}.",
                remedy="Look into the devices' logs, or raise deadline_s; start the server again to continue.",
            )

    def _close_round(
        self,
        collector: ReportCollector,
        reports: dict[str, Report],
        following: RunState,
        *,
        layouts: Mapping[str, tuple[Layout, float]],
        energy: Mapping[str, list[float]],
        **meta: str,
    ) -> list[OutcomeRow]:
        """Let the strategy learn, then journal the end of the round, all in one transaction."""
        number, attempt = collector.server_round, collector.attempt
        outcomes = round_results.outcomes(self._journal, collector, set(self._members.online()))
        terms = self._strategy.observe([outcome for _, outcome in outcomes], number)
        rows = round_results.rows(outcomes, terms)
        done = following.server_round > number
        following = replace(following, strategy=self._strategy.to_dict(), open=False)
        self._journal.close_round(
            following,
            server_round=number,
            attempt=attempt,
            done=done,
            outcomes=rows,
            layouts=layouts,
            energy=energy,
            wall_s=self._wall(),
            means=round_results.means(reports.values()),
            traffic=round_results.traffic(self._journal, collector),
            **meta,
        )
        self._state = following
        self._tell("round_closed", {"server_round": number, "done": done, "accepted": sorted(reports)})
        return rows

    def _finish(self) -> RunResult:
        """Write the final files, tell the devices, then call the run finished."""
        journal = self._journal
        assert self._members.spec is not None
        spec, last = self._members.spec, self.config.num_rounds
        text = journal.meta("layout")
        assert text is not None  # journaled with the last round
        rounds = journal.rounds()
        answers = round_results.accepted(journal, {view.server_round: view.attempt for view in rounds})
        result = write_final(
            self._dir.path,
            run_id=self._run_id,
            config=self.config,
            tensors=self._adapters.load(self._state.blob),
            layout=Layout.from_dict(spec, json.loads(text)),
            layouts={i: kept for i, kept in journal.layouts(spec).items() if i in answers[last]},
            rounds=rounds,
            num_labels=self._members.num_labels,
            trained=round_results.trained(answers),
        )
        self._adapters.clear()
        self._post.announce(
            {i: build_idle_plan(self.config, self._run_id, last, i, FinishedPlan) for i in self._members.everyone()}
        )
        until = self._clock.now() + self.config.deadline_s
        while self._post.behind and (left := until - self._clock.now()) > 0:
            self._hearing.wait(left)
        # Devices stop when they hear it, so the run is called finished only after it was said.
        self._post.close()
        journal.set_meta(result=json.dumps(result.to_dict()))
        logger.info("run %s is finished: %s", self._run_id, result.final_dir)
        self._tell("finished", result.to_dict())
        return result

    # Parts of a round

    def _plan(self, device_id: str, assignment: Assignment, bands: list[BlobRef]) -> PlanRow:
        payload = build_round_plan(self.config, self._run_id, self._state, device_id, assignment, bands)
        return PlanRow(device_id, payload, codec.digest(payload), assignment.u, self._strategy.explain(device_id))

    def _announce(self, collector: ReportCollector) -> None:
        """Publish the round: chunks, plans, and `wait` for whoever is away, else it would take up an older plan."""
        number = collector.server_round
        plans = {row.device_id: row.payload for row in self._journal.plans(number, collector.attempt)}
        self._post.announce({**self._waits(), **plans}, self._adapters.of_plans(collector.plans.values()))

    def _waits(self) -> dict[str, bytes]:
        """`wait` for whoever is away."""
        number = self._state.server_round
        return {i: build_idle_plan(self.config, self._run_id, number, i, WaitPlan) for i in self._members.offline()}

    def _new_context(self) -> RoundContext:
        assert self._members.spec is not None  # journaled with the first round
        return RoundContext(
            self.config,
            self._members.spec,
            self._blobs,
            tensors=self._adapters.load(self._state.blob),
            layouts=self._journal.layouts(self._members.spec),
            first=self._state.server_round == 1,
        )

    def _new_collector(self, context: RoundContext, resumed: bool) -> ReportCollector:
        state = self._state
        return ReportCollector(
            state.server_round,
            state.attempt,
            run_id=self._run_id,
            spec=context.spec,
            num_labels=self._members.num_labels,
            plans=self._journal.plans(state.server_round, state.attempt),
            journal=self._journal,
            blobs=self._blobs,
            uploads=self._dir.path / "uploads",
            gate=context.check,
            rejected=RejectedUpdates(self._dir.path / "rejected", self.config.validation.keep_rejected),
            wall=self._wall,
            resumed=resumed,
        )

    # Start and end

    def _begin(self) -> None:
        """Load what the journal knows, or begin a new run."""
        journal, config = self._journal, self.config
        self._blobs = BlobStore(self._dir.path / "blobs")
        self._adapters = AdapterStore(self._blobs, journal, self._post, config)
        self._expected: set[str] = set()
        real = isinstance(self._clock, RealClock)
        run_id = journal.meta("run_id")
        if run_id is None:
            run_id = secrets.token_hex(8) if real else _virtual_run_id(config)
        journal.set_meta(run_id=run_id, config=_json(config), clock="real" if real else "virtual", stopped="")
        self._run_id = run_id
        # The operator who starts again after failed rounds gets the full number of attempts.
        self._state = replace(journal.state(), failures=0)
        if self._state.strategy is not None:
            self._strategy.load_dict(self._state.strategy)
            logger.info("run %s continues with round %d", run_id, self._state.server_round)
        num_labels = int(journal.meta("num_labels") or 0)
        self._members = DeviceRegistry(config.base_sha256, task=config.task, spec=journal.spec, num_labels=num_labels)
        for status, online, _ in journal.devices():
            self._members.recall(status)
            if online and not self._members[status.device_id].refused:
                self._expected.add(status.device_id)
        self._hearing = MessageDispatcher(
            self._post,
            self._topics,
            journal,
            self._members,
            run_id=run_id,
            retry_s=self._retry_s,
            wall=self._wall,
            tell=self._tell,
        )

    def _connect(self) -> None:
        """Connect and, in a resumed run, give the devices that were online time to be heard again.

        If the broker went down with the server they pause before they look for it again.
        """
        self._post.open(min(FIRST_CONNECT_TIMEOUT_S, self.config.join_timeout_s, self.config.deadline_s))
        until = self._clock.now() + self._retry_s + min(LONGEST_PAUSE_S, self.config.deadline_s)
        while (
            not (self._post.connected and self._hearing.heard >= self._expected)
            and (left := until - self._clock.now()) > 0
        ):
            self._hearing.wait(left)


def _json(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _virtual_run_id(config: FleetConfig) -> str:
    """The same for the same settings: devices derive seeds from it."""
    return codec.digest(json.dumps(settings(msgspec.to_builtins(config)), sort_keys=True).encode())[:16]
