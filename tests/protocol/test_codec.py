"""Messages and tensors survive the wire unchanged; everything else is a ProtocolError that says what is wrong."""

from __future__ import annotations

import contextlib
import json
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedspine_edge.config import OptimizerSettings
from fedspine_edge.errors import BlobError, MessageError, ProtocolError
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import (
    Ack,
    BlobRef,
    FinishedPlan,
    Report,
    RoundPlan,
    Status,
    WaitPlan,
    retry_interval_s,
)

SHA = "ab" * 32
SPEC = ModelSpec(
    family="bert",
    num_layers=6,
    hidden_size=384,
    num_heads=12,
    num_kv_heads=12,
    head_dim=32,
    intermediate_size=1536,
    gated_ffn=False,
    attention_bias=True,
    ffn_bias=True,
    num_parameters=22_000_000,
    base_sha256=SHA,
)
REF = BlobRef(sha256=SHA, size_bytes=200_000)
MESSAGES = [
    Status(device_id="agx-0", state="online", model=SPEC, num_examples=10),
    Status(device_id="agx-0", state="offline"),
    RoundPlan(
        run_id="r",
        device_id="agx-0",
        server_round=3,
        adapter=(REF,),
        training=OptimizerSettings(total_steps=9),
    ),
    Report(run_id="r", device_id="agx-0", server_round=3, plan_sha256=SHA, status="ok", update=REF, loss_before=0.5),
    Ack(run_id="r", device_id="agx-0", server_round=3, status="incomplete", missing=(0, 7)),
]
KINDS = [Status, RoundPlan, WaitPlan, FinishedPlan, Report, Ack]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_message_round_trips(message):
    assert codec.decode(codec.encode(message), type(message)) == message


@given(
    ratio=st.floats(0, 1),
    r=st.integers(1, 256),
    rate=st.floats(1e-8, 10),
    round_=st.integers(0, 10**6),
    device=st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z"),
    run=st.text(max_size=50).filter(lambda s: s.isprintable()),
)
def test_any_valid_plan_round_trips(ratio, r, rate, round_, device, run):
    plan = RoundPlan(
        run_id=run,
        device_id=device,
        server_round=round_,
        pruning_ratio=ratio,
        r=r,
        training=OptimizerSettings(learning_rate=rate),
    )
    assert codec.decode_plan(codec.encode(plan)) == plan


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("round", RoundPlan(run_id="r", device_id="agx-0", server_round=2, num_rounds=4, r=4)),
        ("wait", WaitPlan(run_id="r", device_id="agx-0", server_round=2, num_rounds=4)),
        ("finished", FinishedPlan(run_id="r", device_id="agx-0", server_round=2, num_rounds=4)),
    ],
)
def test_plan_of_an_earlier_server_with_every_field_is_readable(action, expected):
    every_field = json.loads(codec.encode(MESSAGES[2])) | {"server_round": 2, "num_rounds": 4, "r": 4, "adapter": []}
    every_field |= {"action": action, "reason": "", "training": {}}
    assert codec.decode_plan(json.dumps(every_field).encode()) == expected


@pytest.mark.parametrize("kind", [WaitPlan, FinishedPlan])
def test_idle_plan_is_sent_with_fields_that_earlier_devices_know(kind):
    sent = json.loads(codec.encode(kind(run_id="r", device_id="agx-0")))
    assert sent.keys() <= {"schema", "action", "run_id", "device_id", "server_round", "num_rounds", "reason"}


def numbers_of(kind, path=""):
    for field in msgspec.inspect.type_info(kind).fields:
        if field.name == "schema":  # the codec accepts one value only
            continue
        types = getattr(field.type, "types", (field.type,))
        for one in types:
            one = getattr(one, "item_type", one)
            if isinstance(one, msgspec.inspect.StructType):
                yield from numbers_of(one.cls, f"{path}{field.name}.")
            elif isinstance(one, (msgspec.inspect.IntType, msgspec.inspect.FloatType)):
                yield pytest.param(one, id=f"{kind.__name__}.{path}{field.name}")


@pytest.mark.parametrize("number", [n for kind in KINDS for n in numbers_of(kind)])
def test_every_number_in_a_message_has_a_range(number):
    least = number.ge if number.ge is not None else number.gt
    assert least is not None
    assert number.le is not None
    limit = 2**63 if isinstance(number, msgspec.inspect.IntType) else 1e31
    assert number.le < limit, "SQLite's integers have 64 bits; squares and sums of floats stay finite"


@pytest.mark.parametrize("value", ["1" + "0" * 31, "1" + "0" * 400, "1e308", "-1e308", "1e999"])
@pytest.mark.parametrize("name", ["num_examples", "bytes_up", "bytes_down", "loss_after", "completion_time_s"])
def test_report_with_a_number_out_of_range_is_rejected(name, value):
    text = json.dumps(json.loads(codec.encode(MESSAGES[3])) | {name: "@"}).replace('"@"', value)
    with pytest.raises(MessageError, match="not a valid Report"):
        codec.decode(text.encode(), Report)


@pytest.mark.parametrize("changes", [{"num_layers": 10**9}, {"hidden_size": 10**12}, {"intermediate_size": 10**9}])
def test_status_with_an_impossible_model_is_rejected(changes):
    data = json.loads(codec.encode(MESSAGES[0]))
    data["model"] |= changes
    with pytest.raises(MessageError, match="not a valid Status"):
        codec.decode(json.dumps(data).encode(), Status)


@pytest.mark.parametrize("text", ["x" * 65, "a\nb", "\x1b[31m", "\x00"])
def test_status_with_an_unsafe_device_class_is_rejected(text):
    data = json.loads(codec.encode(MESSAGES[0])) | {"device_class": text}
    with pytest.raises(MessageError, match="device_class"):
        codec.decode(json.dumps(data).encode(), Status)


@pytest.mark.parametrize(("deadline_s", "interval_s"), [(4.0, 1.0), (100.0, 2.5), (600.0, 15.0), (1e6, 15.0)])
def test_retry_interval_is_a_fortieth_of_the_deadline_within_limits(deadline_s, interval_s):
    assert retry_interval_s(deadline_s) == interval_s


def test_non_finite_optional_number_is_sent_as_null():
    report = Report(
        run_id="r", device_id="d", server_round=1, plan_sha256=SHA, status="failed", loss_after=float("nan")
    )
    assert codec.decode(codec.encode(report), Report).loss_after is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "understands 1"),
        ({"schema": None}, "schema"),
        ({"r": 0}, r"\$\.r"),
        ({"r": "8"}, "got `str`"),
        ({"pruning_ratio": 1.2}, r"<= 1\.0"),
        ({"pruning_ratio": None}, r"\$\.pruning_ratio"),
        ({"device_id": "a/b"}, r"\$\.device_id"),
        ({"device_id": "+"}, r"\$\.device_id"),
        ({"action": "reboot"}, "reboot"),
        ({"shell": "ls"}, "shell"),
        ({"training": {"learning_rate": -1}}, r"\$\.training\.learning_rate"),
        ({"adapter": [{"sha256": "../etc", "size_bytes": 1}]}, r"\$\.adapter\[0\]\.sha256"),
        ({"adapter": [{"sha256": SHA, "size_bytes": 10**15}]}, r"\$\.adapter\[0\]\.size_bytes"),
        ({"adapter": [{"sha256": SHA, "size_bytes": 1, "chunk_bytes": 1}]}, r"\$\.adapter\[0\]\.chunk_bytes"),
        ({"scaling": float("inf")}, "invalid"),
    ],
)
def test_malformed_plan_names_kind_and_field(change, expected):
    data = json.loads(codec.encode(MESSAGES[2])) | change
    with pytest.raises(MessageError, match=expected) as caught:
        codec.decode_plan(json.dumps(data).encode())
    assert "Plan" in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"schema":1',
        b'{"schema":1e999}',
        b'{"schema":1,"x":' + b"[" * 20_000,
        codec.encode(MESSAGES[0])[:-5],
    ],
    ids=repr,
)
def test_malformed_bytes_raise_message_error(payload):
    with pytest.raises(MessageError):
        codec.decode(payload, Status)


def test_oversized_message_is_rejected_before_parsing():
    with pytest.raises(MessageError, match="65,536"):
        codec.decode_plan(b" " * (codec.MAX_MESSAGE_BYTES + 1))


def test_encoding_an_invalid_message_raises_message_error():
    with pytest.raises(MessageError, match=r"\$\.device_id"):
        codec.encode(WaitPlan(run_id="r", device_id="no/slash"))
    with pytest.raises(MessageError, match=r"\$\.scaling"):
        codec.encode(RoundPlan(run_id="r", device_id="d", scaling=float("nan")))
    with pytest.raises(MessageError, match="65,536"):
        codec.encode(WaitPlan(run_id="r" * 70_000, device_id="d"))


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from(KINDS))
def test_random_bytes_raise_only_protocol_errors(data, kind):
    for read in (lambda: codec.decode(data, kind), lambda: codec.unpack(data)):
        with pytest.raises(ProtocolError):
            read()


@settings(max_examples=300)
@given(st.data())
def test_randomly_damaged_bytes_raise_only_protocol_errors(data):
    message = data.draw(st.sampled_from(MESSAGES))
    for whole, read in (
        (codec.encode(message), lambda b: codec.decode(b, type(message))),
        (codec.pack({"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.int32)}), codec.unpack),
    ):
        damaged = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ProtocolError):
            read(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


# Tensors


def header_of(entries: object, *, body: int = 24) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def entry(dtype="F32", shape=(6,), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


arrays = st.sampled_from(["<f4", "<f2", "<i4"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)


@given(st.dictionaries(st.text(st.characters(codec="ascii"), min_size=1, max_size=20), arrays, max_size=5))
def test_packed_tensors_do_not_depend_on_insertion_order(tensors):
    tensors.pop("__metadata__", None)
    data = codec.pack(tensors)
    assert data == codec.pack(dict(reversed(tensors.items())))
    back = codec.unpack(data)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes()


def test_pack_keeps_values_of_non_contiguous_tensors():
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = codec.unpack(codec.pack({"t": base.T, "s": base[:, ::2], "e": base.astype(">f4")}))
    np.testing.assert_array_equal(back["t"], base.T)
    np.testing.assert_array_equal(back["s"], base[:, ::2])
    np.testing.assert_array_equal(back["e"], base)


@pytest.mark.parametrize("dtype", ["float64", "int64", "bool", "complex64", "O", "U3"])
def test_pack_rejects_other_dtypes(dtype):
    with pytest.raises(BlobError, match="'t'"):
        codec.pack({"t": np.zeros(2, dtype=dtype)})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "end before"),
        (b"\x01\0\0", "end before"),
        (struct.pack("<Q", 2**63), "end before"),
        (struct.pack("<Q", codec.MAX_HEADER_BYTES + 1) + bytes(codec.MAX_HEADER_BYTES + 1), "header has"),
        (header_of(b"[]"), "not an object"),
        (header_of(b"{"), "safetensors"),
        (header_of(b"[" * 50_000), "safetensors"),
        (header_of(b"\xff\xfe"), "safetensors"),
        (header_of({"__metadata__": {"text": "hello"}, "a": entry()}), "metadata"),
        (header_of(b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24],"note":"x"}}'), "note"),
        (
            header_of(
                b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
                b'"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
            ),
            "repeated",
        ),
        (header_of({"a": entry("F64", (3,))}), "F64"),
        (header_of({"a": entry("BF16", (12,))}), "BF16"),
        (header_of({"a": entry(shape=(7,))}), "safetensors"),
        (header_of({"a": entry(shape=(-6,))}), "safetensors"),
        (header_of({"a": entry(shape=(2**62, 2**62))}), "safetensors"),
        (header_of({"a": entry(shape=(1, 1, 1, 1, 6))}), "5 dimensions"),
        (header_of({"a": entry(shape=({},))}), "safetensors"),
        (header_of({"a": entry(offsets=(24, 0))}), "safetensors"),
        (header_of({"a": entry(offsets=(0, 48))}), "safetensors"),
        (header_of({"a": entry(), "b": entry()}), "safetensors"),
        (header_of({"a": entry(shape=(3,), offsets=(0, 12))}), "safetensors"),
        (header_of({"a": entry()}, body=20), "safetensors"),
        (header_of({"a": entry()}, body=30), "safetensors"),
        (
            header_of({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(codec.MAX_TENSORS + 1)}, body=0),
            "8193 tensors",
        ),
    ],
)
def test_unpack_rejects_malformed_blobs(data, expected):
    with pytest.raises(BlobError, match=expected):
        codec.unpack(data)


def test_unpack_rejects_blobs_over_the_limit():
    data = codec.pack({"a": np.zeros(100, np.float32)})
    with pytest.raises(BlobError, match="at most 100"):
        codec.unpack(data, max_bytes=100)


def test_pack_rejects_too_many_tensors():
    with pytest.raises(BlobError, match="8193"):
        codec.pack({str(i): np.zeros(0, np.float32) for i in range(codec.MAX_TENSORS + 1)})


@pytest.mark.parametrize("kind", ["round", "update"])
def test_allow_list_accepts_documented_names(kind):
    shared = ["layers.0.q.lora_A", "layers.31.gate.lora_B", "head.classifier.weight", "head.bias"]
    own = {"round": ["order.0.heads", "order.11.channels"], "update": ["keep.0.heads", "scores.3.channels"]}
    own["update"].append("scored.3.channels")
    codec.check_names(shared + own[kind], kind)
    other = "update" if kind == "round" else "round"
    for name in own[kind]:
        with pytest.raises(BlobError, match=name):
            codec.check_names([name], other)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "layers.0.q.weight",
        "layers.0.q.lora_A\n",
        "layers.00.q.lora_A",
        "layers.-1.q.lora_A",
        "layers.99999.q.lora_A",
        "layers.0.norm.lora_A",
        "xlayers.0.q.lora_A",
        "embeddings.weight",
        "head",
        "head.",
        "head./etc/passwd",
        "head." + "x" * 65,
        "keep.0.rows",
        "text",
    ],
)
def test_allow_list_rejects_other_names(name):
    for kind in ("round", "update"):
        with pytest.raises(BlobError, match="allow-list"):
            codec.check_names([name], kind)


def test_allow_list_rejects_a_dtype_that_the_name_does_not_allow():
    codec.check_tensors({"layers.0.q.lora_A": np.zeros(1, np.float16), "keep.0.heads": np.zeros(1, np.int32)}, "update")
    with pytest.raises(BlobError, match="expected int32"):
        codec.check_tensors({"keep.0.heads": np.zeros(1, np.float32)}, "update")
    with pytest.raises(BlobError, match="expected float16 or float32"):
        codec.check_tensors({"layers.0.q.lora_A": np.zeros(1, np.int32)}, "update")


def test_digest_is_sha256():
    assert codec.digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_largest_messages_fit_the_size_limit():
    """64 missing indices and a full model description stay far below the cap."""
    ack = Ack(run_id="r" * 100, device_id="d" * 64, server_round=9, status="incomplete", missing=tuple(range(64)))
    assert len(codec.encode(ack)) < 4096
    assert all(len(msgspec.json.encode(message)) < 4096 for message in MESSAGES)
