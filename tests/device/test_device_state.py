"""Durable state: exact roundtrip, and detection of damage."""

import numpy as np
import pytest

from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.training.state_dir import StateDir, StateRecord

SPEC = ModelSpec(
    family="bert",
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    gated_ffn=False,
    attention_bias=True,
    ffn_bias=True,
    num_parameters=1000,
    base_sha256="0" * 64,
)


def test_state_record_roundtrips_bit_for_bit(tmp_path):
    tensors = {
        "a": np.array([[1.5, np.pi]], np.float32),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "view": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    with StateDir(tmp_path) as state:
        assert state.read("round") is None
        state.write("round", StateRecord({"x": [1, 0.1], "nan": float("nan")}, tensors))
        back = state.read("round")
    assert back.info["x"] == [1, 0.1]
    assert set(back.tensors) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back.tensors[name], value)
        assert back.tensors[name].dtype == value.dtype
        assert back.tensors[name].shape == value.shape


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_damaged_state_names_file_and_remedy(tmp_path, damage):
    with StateDir(tmp_path) as state:
        state.write("device", StateRecord({"a": 1}, {"x": np.ones(64, np.float32)}))
        path = tmp_path / "device.state"
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-7] ^= 1
        path.write_bytes({"truncate": data[:-9], "empty": b"", "foreign": b"\x80\x04pickle"}.get(damage, data))
        with pytest.raises(CheckpointError, match=r"device\.state") as caught:
            state.read("device")
    assert f"Delete the folder {tmp_path}" in caught.value.remedy


def test_failed_write_keeps_old_record(tmp_path, monkeypatch):
    with StateDir(tmp_path) as state:
        state.write("device", StateRecord({"a": 1}, {}))

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            state.write("device", StateRecord({"a": 2}, {}))
        monkeypatch.undo()
        assert state.read("device").info == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["device.state", "lock"]


def test_second_agent_on_folder_raises(tmp_path):
    first = StateDir(tmp_path)
    with pytest.raises(ConfigError, match="in use by another process"):
        StateDir(tmp_path)
    first.close()
    StateDir(tmp_path).close()


def test_read_only_folder_raises_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        StateDir(tmp_path / "file")


def test_layout_roundtrips_as_tensors():
    layout = Layout(SPEC, (np.array([1]), np.array([0, 1])), (np.array([0, 3]), np.arange(8)))
    assert Layout.from_tensors(SPEC, layout.to_tensors()).to_dict() == layout.to_dict()
