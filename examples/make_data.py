"""Write data to try things with: rated sentences about films, products, news and tweets, as CSV files.

    python3 examples/make_data.py                    # train.csv and test.csv in this folder
    python3 examples/make_data.py --num-devices 3    # also device-1.csv, device-2.csv, …: a share for each device

Columns: domain, text, label (0 negative, 1 positive). The sentences are those of Hutto & Gilbert, VADER, ICWSM 2014
(MIT licence). They are fetched through pip on first use and kept in ~/.cache/fedspine_edge. Each device's sentences
come from one domain only, so the devices' data differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.data import sentiment
from fedspine_edge.errors import FedspineError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to (default: this one)")
    parser.add_argument("--examples", type=int, default=2000, help="sentences in train.csv (default: 2000)")
    parser.add_argument("--num-devices", type=int, default=0, help="number of device-N.csv files (default: 0)")
    arguments = parser.parse_args()

    data = sentiment.load()
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = {"train.csv": data.train[: arguments.examples], "test.csv": data.test[:400]}
    shares = sentiment.partition(data.train, arguments.num_devices)
    files |= {f"device-{number}.csv": tuple(share) for number, share in enumerate(shares, 1)}
    for name, sentences in files.items():
        sentiment.write_csv(arguments.out / name, sentences)
        print(f"{arguments.out / name}: {len(sentences)} sentences")


if __name__ == "__main__":
    try:
        main()
    except FedspineError as error:
        raise SystemExit(f"error: {error}") from None
