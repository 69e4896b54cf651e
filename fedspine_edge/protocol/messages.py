"""Messages between server and devices: msgspec structs with a schema version, without torch or MQTT.

Messages are idempotent. A plan is the desired state (retained), a report answers exactly one plan, an ack answers a
report. Messages contain no tensors; a `BlobRef` refers to a content-addressed blob.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

import msgspec
from msgspec import Meta

from fedspine_edge.config import OptimizerSettings, Task
from fedspine_edge.files import Sha256
from fedspine_edge.model.spec import Label, ModelSpec

SCHEMA = 1
CHUNK_BYTES = 96 * 1024
"""Small enough for the default limits of Mosquitto, EMQX, AWS IoT and the embedded broker."""

MAX_BLOB_BYTES = 2 * 1024**3
"""Largest blob, checked before anything is allocated for an announced one."""

MAX_RANK = 256
"""Largest LoRA rank."""

MAX_RETRY_S = 15.0
"""Longest retry interval; also used while no plan with a deadline is known."""

DeviceId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
RunId = Annotated[str, Meta(max_length=128)]
Reason = Annotated[str, Meta(max_length=4096)]

# Every number has a range, so that sums over all devices and rounds fit into 64 bits and into a double. Whatever was
# decoded can be journaled and aggregated.
Ratio = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0, le=10**9)]
Positive = Annotated[int, Meta(ge=1, le=10**9)]
Bytes = Annotated[int, Meta(ge=0, le=2**44)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
MAX_FIGURE = 1e30
"""Largest absolute value of a reported loss or importance."""
Figure = Annotated[float, Meta(ge=-MAX_FIGURE, le=MAX_FIGURE)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages; the codec checks `schema`."""

    schema: int = SCHEMA


class BlobRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reference to a content-addressed blob: its hash, its size and the size of its chunks."""

    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_BLOB_BYTES)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = CHUNK_BYTES

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the blob."""
        return -(-self.size_bytes // self.chunk_bytes)


class Status(Message, frozen=True, kw_only=True):
    """Device → server, retained; the same with state `offline` is the last will."""

    device_id: DeviceId
    state: Literal["online", "offline"]
    model: ModelSpec | None = None
    device_class: Label = "unknown"
    num_examples: Count = 0
    task: Task = "classification"
    num_labels: Count = 0
    """Classes of the task; 0 for causal_lm."""
    memory_bytes: Bytes = 0
    """Memory that the device is willing to train in; 0 means not stated."""
    memory_base_bytes: Bytes = 0
    """Estimated peak of a round at rank 0, one example at a time; 0 means no estimate."""
    memory_per_rank_bytes: Bytes = 0
    """Memory that each rank adds."""
    pruning_ratio: Ratio = 0.0
    """Share of prunable parameters that the device has already removed."""
    version: Label = ""


class PlanBase(Message, frozen=True, kw_only=True, tag_field="action"):
    """Fields that every plan has. The tag `action` selects the kind of plan."""

    run_id: RunId
    device_id: DeviceId
    server_round: Count = 0
    num_rounds: Positive = 1


class RoundPlan(PlanBase, frozen=True, kw_only=True, tag="round"):
    """Server → device, retained: train a round."""

    attempt: Positive = 1
    """Above 1 when the round is repeated because too few devices answered; makes the plan a new one."""
    pruning_ratio: Ratio = 0.0
    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 8
    scaling: Annotated[float, Meta(gt=0.0, le=1e6)] = 2.0
    """lora_alpha / r, held constant over ranks so that truncation alone changes the adapter."""
    tau: Count = 20
    """Local iterations before pruning, every one of them scored."""
    recovery_steps: Count = 20
    layout: Literal["consensus", "local"] = "consensus"
    criterion: Literal["lora", "apt", "magnitude", "random"] = "lora"
    importance_metric: Literal["auto", "abs", "square", "signed", "group"] = "auto"
    scope: Literal["layer", "global"] = "layer"
    round_to: Positive = 8
    deadline_s: Annotated[float, Meta(gt=0.0, le=1e9)] = 600.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    adapter: Annotated[tuple[BlobRef, ...], Meta(max_length=64)] = ()
    """What the round starts from: task head, consensus order and the rank slices of the global adapter up to rank r."""
    training: OptimizerSettings = OptimizerSettings()
    reason: Literal[""] = ""
    """Always empty. Schema 1 requires that the plans of earlier servers, which carry the field, stay readable."""


# Earlier servers send the fields of a round with every plan, so these two ignore fields that they do not know.
class WaitPlan(PlanBase, frozen=True, kw_only=True, tag="wait", forbid_unknown_fields=False):
    """Server → device: do nothing now. Retained, unless it answers the status of a device that may not take part."""

    reason: Reason = ""
    """Why the device may not take part, and what to do; empty for a device that merely has no round."""


class FinishedPlan(PlanBase, frozen=True, kw_only=True, tag="finished", forbid_unknown_fields=False):
    """Server → device, retained: the run is over."""


Plan = Union[RoundPlan, WaitPlan, FinishedPlan]
"""Server → device: what the device is to do now."""


def retry_interval_s(deadline_s: float) -> float:
    """Return the seconds after which an unanswered message of a round with this deadline is sent again.

    Server and devices use the same interval: a fortieth of the deadline, within 1 s to `MAX_RETRY_S`.
    """
    return min(MAX_RETRY_S, max(1.0, deadline_s / 40))


class Report(Message, frozen=True, kw_only=True):
    """Device → server: the outcome of one plan. It contains numbers only, and nothing of the data itself."""

    run_id: RunId
    device_id: DeviceId
    server_round: Positive
    plan_sha256: Sha256
    status: Literal["ok", "out_of_memory", "failed"]
    reason: Reason = ""
    update: BlobRef | None = None
    num_examples: Count = 0
    loss_before: Figure | None = None
    loss_after: Figure | None = None
    """Mean loss on the same held-out examples before the first and after the last step."""
    accuracy_before: Ratio | None = None
    accuracy_after: Ratio | None = None
    train_loss: Figure | None = None
    lora_importance: Figure | None = None
    """I(B_total): EMA of the size-normalised sum of |B * gB| over modules."""
    pruning_ratio: Ratio = 0.0
    r: Annotated[int, Meta(ge=0, le=MAX_RANK)] = 0
    completion_time_s: Seconds = 0.0
    time_kind: Literal["measured", "modelled", "simulated"] = "measured"
    """measured = wall clock; modelled = process CPU time × class factor + modelled transfer; simulated = cost model."""
    steps: Count = 0
    skipped_steps: Count = 0
    peak_memory_bytes: Bytes = 0
    bytes_down: Bytes = 0
    bytes_up: Bytes = 0


class Ack(Message, frozen=True, kw_only=True):
    """Server → device: the result of a report."""

    run_id: RunId
    device_id: DeviceId
    server_round: Positive
    status: Literal["incomplete", "accepted", "refused", "late"]
    missing: Annotated[tuple[Count, ...], Meta(max_length=64)] = ()
    """Chunk indices of the update still to be sent, at most 64 at a time (status `incomplete`)."""
    reason: Reason = ""
