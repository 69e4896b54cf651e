"""A fleet of two devices on this machine: a broker, a server and two device processes, up to the finished model.

    python examples/fleet.py BASE_MODEL_FOLDER [OUT]

Each process runs the command that you would run on a machine of its own. Only the addresses would differ.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from fedspine_edge import EmbeddedBroker

POSITIVE = ["a lovely board", "works like a charm", "quick and quiet", "I would buy it again", "a joy to use"]
NEGATIVE = ["a noisy board", "broke after a day", "slow and hot", "I sent it back", "a pain to use"]
COMMAND = [sys.executable, "-m", "fedspine_edge"]


def main(model: str, out: Path) -> None:
    with EmbeddedBroker() as broker:
        fleet = out / "fleet.toml"
        fleet.write_text(
            f"""
            num_rounds = 5
            pruning_ratio = 0.4
            ranks = [4, 8]
            min_devices = 2
            run_dir = '{out / "run"}'
            broker = {{ host = "127.0.0.1", port = {broker.port} }}
            training = {{ tau = 4, recovery_steps = 4, batch_size = 4, max_length_tokens = 16 }}
            """
        )
        processes = [subprocess.Popen([*COMMAND, "server", "--config", str(fleet)])]
        for name, noun in (("kitchen", "kettle"), ("garden", "pump")):
            data = out / f"{name}.csv"
            rows = [
                (f"{text}, this {noun}", label) for label, texts in enumerate((NEGATIVE, POSITIVE)) for text in texts
            ]
            data.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
            config = out / f"{name}.toml"
            config.write_text(
                f"""
                device_id = "{name}"
                model = '{model}'
                state_dir = '{out / name}'
                torch_threads = 1
                data = {{ path = '{data}', num_labels = 2, holdout = 4 }}
                broker = {{ host = "127.0.0.1", port = {broker.port} }}
                """
            )
            processes.append(subprocess.Popen([*COMMAND, "device", "--config", str(config)]))
        if any(process.wait(timeout=300) for process in processes):
            sys.exit("a process failed; see its messages above")
    subprocess.run([*COMMAND, "assemble", str(out / "run"), "--model", model, "--out", str(out / "model")], check=True)
    subprocess.run([*COMMAND, "compile", str(out / "model"), "--out", str(out / "bundle")], check=True)
    subprocess.run([*COMMAND, "run", str(out / "bundle"), "--text", "a lovely kettle"], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="fleet-")))
