"""Encodes messages and tensors as bytes and decodes them, checking every length before anything is allocated.

Messages are JSON (readable with `mosquitto_sub`), tensors are safetensors. Malformed bytes raise a `ProtocolError` and
no other error. `check_names` and `check_tensors` enforce the allow-list of `protocol.blobs`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from fedspine_edge.errors import BlobError, MessageError
from fedspine_edge.protocol.blobs import BlobKind, allowed_dtypes
from fedspine_edge.protocol.messages import MAX_BLOB_BYTES, SCHEMA, Message, Plan

M = TypeVar("M", bound=Message)
Tensor = npt.NDArray[Any]

MAX_MESSAGE_BYTES = 64 * 1024
MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 8192
MAX_DIMENSIONS = 4
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "I32": np.dtype("int32")}
"""The only element types on the wire, by their safetensors name."""


class _Versioned(msgspec.Struct):
    schema: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def encode(message: Message) -> bytes:
    """Return `message` as JSON, validated like a received message, so that nothing is sent that would be rejected.

    A NaN or infinity in an optional field becomes null. Raises `MessageError`.
    """
    payload = msgspec.json.encode(message)
    decode(payload, type(message))
    return payload


def decode(payload: bytes, kind: type[M]) -> M:
    """Return the message of type `kind` in `payload`.

    Raises `MessageError` with the kind, the field and what was expected.
    """
    message: M = _decode(payload, kind, kind.__name__)
    return message


def decode_plan(payload: bytes) -> Plan:
    """Return the plan in `payload`; its field `action` selects the kind. Raises `MessageError` as `decode` does."""
    plan: Plan = _decode(payload, Plan, "Plan")
    return plan


def _decode(payload: bytes, kind: Any, name: str) -> Any:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{name} has {len(payload):,} bytes; at most {MAX_MESSAGE_BYTES:,} are accepted.")
    try:
        schema = msgspec.json.decode(payload, type=_Versioned).schema
        if schema != SCHEMA:
            raise MessageError(
                f"{name} field 'schema' is {schema}; this version understands {SCHEMA}.",
                remedy="Update the older of server and device so that both speak the same schema.",
            )
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageError(
            f"not a valid {name}: {error}.", remedy="docs/reference/protocol.md lists the fields."
        ) from error


def digest(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return `tensors` as safetensors bytes; the same tensors always give the same bytes.

    Raises `BlobError` for more than `MAX_TENSORS`, a dtype outside `DTYPES` or too many bytes.
    """
    if len(tensors) > MAX_TENSORS:
        raise BlobError(f"{len(tensors)} tensors to pack; at most {MAX_TENSORS} go into one blob.")
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        native = tensor.dtype.newbyteorder("=")
        if native not in DTYPES.values() or tensor.ndim > MAX_DIMENSIONS:
            raise BlobError(
                f"tensor {name!r} is {tensor.dtype} with {tensor.ndim} dimensions; "
                f"allowed are {_dtype_names()} with at most {MAX_DIMENSIONS}."
            )
        # asarray(order="C") rather than ascontiguousarray: the latter turns scalars into vectors.
        ready[name] = np.asarray(tensor, dtype=native, order="C")
    size = sum(tensor.nbytes for tensor in ready.values())
    if size > MAX_BLOB_BYTES - MAX_HEADER_BYTES:
        raise BlobError(f"{size:,} bytes of tensors; a blob holds at most {MAX_BLOB_BYTES - MAX_HEADER_BYTES:,}.")
    try:
        data = safetensors.numpy.save(ready)
    except (SafetensorError, ValueError) as error:
        raise BlobError(f"tensors cannot be packed: {error}.") from error
    _check_header(data)
    return data


def unpack(data: bytes, *, max_bytes: int = MAX_BLOB_BYTES) -> dict[str, Tensor]:
    """Return the tensors in safetensors bytes, by name.

    Raises `BlobError` for anything truncated, tampered with, over a limit, or outside `DTYPES`.
    """
    if len(data) > max_bytes:
        raise BlobError(f"blob has {len(data):,} bytes; at most {max_bytes:,} are accepted.")
    _check_header(data)
    try:
        return safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise BlobError(f"not valid safetensors: {error}.") from error


def check_names(names: Iterable[str], kind: BlobKind) -> None:
    """Raise `BlobError` with the first name that a round or update blob may not contain."""
    for name in names:
        if allowed_dtypes(name, kind) is None:
            raise BlobError(
                f"tensor {name[:80]!r} is not on the allow-list of {kind} blobs.",
                remedy="docs/reference/protocol.md lists the allowed tensor names.",
            )


def check_tensors(tensors: Mapping[str, Tensor], kind: BlobKind) -> None:
    """Raise `BlobError` as `check_names` does, or for a tensor whose element type its name does not allow."""
    check_names(tensors, kind)
    for name, tensor in tensors.items():
        dtypes = allowed_dtypes(name, kind)
        if dtypes is None or tensor.dtype.name not in dtypes:
            raise BlobError(f"tensor {name!r} is {tensor.dtype}; expected {' or '.join(sorted(dtypes or ()))}.")


def _check_header(data: bytes) -> None:
    """Check the limits of a safetensors header before the parser allocates anything for it.

    Free-form `__metadata__` is rejected, since text could leave a device in it.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise BlobError(f"not valid safetensors: {len(data):,} bytes end before the header does.")
    if length > MAX_HEADER_BYTES:
        raise BlobError(f"safetensors header has {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted.")
    try:
        # json, unlike msgspec, reports repeated names, of which a parser keeps only one.
        pairs = json.loads(data[8 : 8 + length], object_pairs_hook=_Pairs)
        if not isinstance(pairs, _Pairs):
            raise BlobError("not valid safetensors: the header is not an object.")
        header = {name: msgspec.convert(_plain(entry), _Entry) for name, entry in pairs.items if _is_tensor(name)}
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise BlobError(f"not valid safetensors: {error}.") from error
    if len(header) != len(pairs.items):
        raise BlobError("not valid safetensors: a tensor name is repeated.")
    if len(header) > MAX_TENSORS:
        raise BlobError(f"blob has {len(header)} tensors; at most {MAX_TENSORS} are accepted.")
    for name, entry in header.items():
        if entry.dtype not in DTYPES or len(entry.shape) > MAX_DIMENSIONS:
            raise BlobError(
                f"tensor {name[:80]!r} is {entry.dtype[:8]} with {len(entry.shape)} dimensions; "
                f"allowed are {_dtype_names()} with at most {MAX_DIMENSIONS}."
            )


class _Pairs:
    """A JSON object as a list, including repeated names."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        self.items = items


def _plain(entry: Any) -> Any:
    return dict(entry.items) if isinstance(entry, _Pairs) else entry


def _is_tensor(name: str) -> bool:
    if name == "__metadata__":
        raise BlobError("blob contains free-form metadata; only tensors are allowed.")
    return True


def _dtype_names() -> str:
    return ", ".join(dtype.name for dtype in DTYPES.values())
