"""Measure the decoding latency of each model of benchmarks/moe_table, and write it there.

    OMP_NUM_THREADS=1 python benchmarks/table_latencies.py [--models 100]

The models have untrained weights. `decode_ratio` is the latency of a decoding step over that of the
reference model of `decode_ms`, timed in alternation; `decode_spread` is the half-width of its 95 %
interval, as a share. The command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys

import pandas as pd
import torch
from replay.table import FILE, FOLDER, LATENCIES, save

from moenas import Space
from moenas.evaluate.devices import device_info
from moenas.evaluate.dtypes import deployed_dtype
from moenas.evaluate.job import versions
from moenas.evaluate.matching import open_corpus
from moenas.evaluate.untrained_latency import measure_untrained
from moenas.records import Plain

SECONDS = 4.0
"""Longest time of one measurement."""
SAVED_EACH = 20
"""Models after which the table is written."""


def latency_space() -> Space:
    """Return the space of the table with `decode_ms` as its objective."""
    overrides = ["objectives=[decode_ms]", f"measure.max_seconds={SECONDS}"]
    return Space.load(FOLDER / "space.yaml", overrides)


def facts(space: Space) -> Plain:
    """Return what the latencies depend on: the device and the versions."""
    device = torch.device("cpu")
    dtype = deployed_dtype(space.measure, device)
    info = device_info(device, space.measure.threads, dtype)
    info.pop("host", None)
    return {"device": info, "versions": versions(), "max_seconds": SECONDS}


def measure(rows: pd.DataFrame, limit: int | None) -> None:
    """Measure the models without a latency, at most `limit`, and write the table now and then."""
    space = latency_space()
    here = json.loads(json.dumps(facts(space)))
    before = rows.attrs.get("latency")
    if before not in (None, here):
        sys.exit(f"the table has latencies of another device or version: {before}")
    rows.attrs["latency"] = here
    corpus = open_corpus(space)
    todo = rows[rows["decode_ratio"].isna()].drop_duplicates("fingerprint")[:limit]
    for number, row in enumerate(todo.to_dict("records"), 1):
        architecture = space.architecture(json.loads(row["architecture"]))
        latencies = measure_untrained(
            space, corpus, architecture, space.objectives, torch.device("cpu")
        )
        details = latencies["decode_ms"].details
        same = rows["fingerprint"] == row["fingerprint"]
        rows.loc[same, "decode_ratio"] = details["ratio"]
        rows.loc[same, "decode_spread"] = details["spread"]
        line = f"ratio {details['ratio']:.3f}, spread {100 * details['spread']:.1f} %"
        print(f"[{number}/{len(todo)}] {line} | {architecture.describe()}", flush=True)
        if number % SAVED_EACH == 0:
            save(rows)
    save(rows)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, help="models to measure; else all")
    given = parser.parse_args()
    rows = pd.read_parquet(FILE)
    for name in LATENCIES:
        rows[name] = rows[name].astype("float64") if name in rows else float("nan")
    measure(rows, given.models)


if __name__ == "__main__":
    main()
