"""Simulated disconnects of devices during a round, in virtual time."""

from __future__ import annotations

import random

from fedspine_edge.config import DeviceConfig
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import RoundPlan
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.simulation.virtual_network import Participant, VirtualTransport
from fedspine_edge.transport.base import Event, Incoming

OFFLINE_SHARE = 0.999
"""Share of the round's deadline for which a device is offline. It returns in time for the next round."""


class DisconnectingDevice:
    """Wrapper of a device that disconnects it in a round with the configured probability.

    Whether a round is lost is a function of seed, device and round, so that a run is repeatable.
    """

    def __init__(self, device: Participant, transport: VirtualTransport, config: DeviceConfig) -> None:
        self._device, self._transport, self._config = device, transport, config
        self._plan_topic = Topics(config.fleet).plan(config.device_id)
        self._lost = b""

    def handle(self, event: Event) -> None:
        if isinstance(event, Incoming) and event.topic == self._plan_topic and event.payload:
            if event.payload == self._lost:
                return
            plan = codec.decode_plan(event.payload)
            if isinstance(plan, RoundPlan) and self._is_lost(plan):
                self._lost = event.payload
                self._transport.disconnect(OFFLINE_SHARE * plan.deadline_s)
                return
        self._device.handle(event)

    def tick(self) -> None:
        self._device.tick()

    def next_wakeup(self) -> float | None:
        return self._device.next_wakeup()

    def _is_lost(self, plan: RoundPlan) -> bool:
        config = self._config
        draw = random.Random(f"{config.seed}/{config.device_id}/drop/{plan.server_round}/{plan.attempt}").random()
        return draw < config.simulated.disconnect_probability
