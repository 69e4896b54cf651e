"""Device classes: strict reading of files, mixes, and settings of simulated devices."""

from pathlib import Path

import pytest
from recorded_fleet import recorded_fleet

from fedspine_edge.cli.main import main
from fedspine_edge.data import sentiment
from fedspine_edge.errors import ConfigError
from fedspine_edge.simulation.device_classes import interleave_classes, load_device_classes, parse_mix, scale_mix


def test_built_in_classes_are_ordered_by_speed() -> None:
    profiles = load_device_classes()
    rates = [profiles[name].rate for name in ("tx2", "nx", "agx", "agx-orin")]
    assert rates == sorted(rates)
    assert profiles["tx2"].rate == pytest.approx(2 * 256 * 1300e6 * 0.25)
    for fast, slow in (("tx2", "tx2-maxq"), ("orin-nano", "orin-nano-7w"), ("agx-orin", "agx-orin-15w")):
        assert profiles[slow].rate < profiles[fast].rate
        assert profiles[slow].step_s > profiles[fast].step_s
    factors = [profiles[name].time_factor for name in ("paper-agx", "paper-nx", "paper-tx2")]
    assert factors == [1.0, 1.2, 1.43]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nboard = "x"\nstep_s = 0.1\nup_mbit_s = 1.0\ndown_mbit_s = 1.0', r"\[a\]: needs flops_per_s"),
        ('[a]\nboard = "x"\nflops_per_s = 1e9\nstep_s = 0.1\nup_mbit_s = 1.0\nspeed = 2', r"\[a\].*`speed`"),
        ("[a", "cannot be read"),
    ],
)
def test_load_device_classes_invalid_file_names_section(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_device_classes(path)


def test_scale_mix_keeps_every_class() -> None:
    profiles = load_device_classes()
    mix = parse_mix("tx2=30,nx=40,agx=10", profiles)
    assert scale_mix(mix, 80) == mix
    assert scale_mix(mix, 8) == {"tx2": 3, "nx": 4, "agx": 1}
    assert scale_mix(mix, 3) == {"tx2": 1, "nx": 1, "agx": 1}
    for number in range(3, 200):
        assert sum(scale_mix(mix, number).values()) == number
    with pytest.raises(ConfigError, match="are too few for 3 device classes"):
        scale_mix(mix, 2)
    with pytest.raises(ConfigError, match="unknown device class 'tx3'"):
        parse_mix("tx3=1", profiles)
    with pytest.raises(ConfigError, match="is not of the form CLASS=COUNT"):
        parse_mix("tx2=0", profiles)


def test_interleave_classes_spreads_each_class() -> None:
    names = interleave_classes({"tx2": 3, "nx": 4, "agx": 1})
    assert sorted(names) == ["agx"] + ["nx"] * 4 + ["tx2"] * 3
    assert all(names[i : i + 3] != [names[i]] * 3 for i in range(6))


def test_simulated_device_has_settings_of_its_class(tmp_path: Path) -> None:
    _, devices = recorded_fleet(tmp_path, {"tx2": 1, "paper-nx": 1}, disconnect_probability=0.1)
    by_class = {device.device_class: device for device in devices}
    profile = load_device_classes()["tx2"]
    assert by_class["tx2"].simulated.flops_per_s == profile.rate
    assert by_class["tx2"].simulated.disconnect_probability == 0.1
    assert by_class["tx2"].memory_limit_mib == profile.memory_mib
    assert by_class["paper-nx"].time_factor == 1.2


def test_dirichlet_small_alpha_is_uneven_without_empty_shares() -> None:
    rows = [sentiment.Sentence("x", f"t{i}", i % 2) for i in range(2000)]

    def unevenness(alpha: float) -> float:
        shares = sentiment.dirichlet(rows, 10, alpha=alpha, seed=1)
        assert sorted(s.text for share in shares for s in share) == sorted(s.text for s in rows)
        assert min(map(len, shares)) >= 16
        return sum(abs(sum(s.label for s in share) / len(share) - 0.5) for share in shares) / 10

    assert unevenness(0.1) > 2 * unevenness(10.0)
    assert sentiment.dirichlet(rows, 10, alpha=0.3, seed=1) == sentiment.dirichlet(rows, 10, alpha=0.3, seed=1)


def test_simulate_command_trains_mix(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sim"
    settings = tmp_path / "fleet.toml"
    settings.write_text(
        "num_rounds = 4\nround_to = 4\nranks = [2, 4]\npruning_ratio = 0.2\n"
        "[training]\ntau = 2\nrecovery_steps = 1\nbatch_size = 4\nmax_length_tokens = 16\n"
    )
    options = ["--config", str(settings), "--mix", "tx2=1,nx=1", "--model", str(tiny_model), "--data", str(tiny_csv)]
    assert main(["simulate", *options, "--dirichlet", "0.5", "--out", str(out)]) == 0
    assert "finished after 4 rounds" in capsys.readouterr().out
    assert main(["simulate", "--mix", "tx2=1", "x.toml"]) == 2
    assert "cannot be combined" in capsys.readouterr().err
