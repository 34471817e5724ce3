"""Read and write the recorded table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parents[1] / "moe_table"
FILE = FOLDER / "moe_table.parquet"
RUNGS = 8
"""Columns of losses, `loss_1` to `loss_8`: after each eighth of the training tokens."""
LATENCIES = ("decode_ratio", "decode_spread")
"""Columns that `table_latencies.py` writes."""
COSTS = ("params", "active_params", "flops_per_token", "kv_bytes_per_token")


class Table:
    """The recorded evaluations, by fingerprint and seed."""

    def __init__(self, rows: pd.DataFrame, tokens: int) -> None:
        """Take the rows of the table; `tokens` are the training tokens of each."""
        self.rows, self.tokens = rows, tokens
        self._rows: dict[tuple[str, int], Mapping[str, Any]] = {
            (row["fingerprint"], row["seed"]): row for row in rows.to_dict("records")
        }
        means = rows.groupby("fingerprint")[f"loss_{RUNGS}"].mean()
        self._means = {str(key): float(loss) for key, loss in means.items()}

    @classmethod
    def load(cls, file: Path = FILE) -> Table:
        """Read the table; it needs `pyarrow`."""
        rows = pd.read_parquet(file)
        return cls(rows, int(rows.attrs["train"]["tokens"]))

    def digest(self) -> str:
        """Return the SHA-256 of what a replay reads: costs and losses, not latencies."""
        losses = [f"loss_{rung}" for rung in range(1, RUNGS + 1)]
        replayed = self.rows[["fingerprint", "seed", *COSTS, *losses]]
        return sha256(replayed.to_csv(index=False).encode()).hexdigest()

    def __contains__(self, fingerprint: str) -> bool:
        return (fingerprint, 0) in self._rows

    def row(self, fingerprint: str, seed: int = 0) -> Mapping[str, Any]:
        """Return a row; `KeyError` if the architecture was not trained with that seed."""
        return self._rows[fingerprint, seed]

    def mean_loss(self, fingerprint: str) -> float:
        """Return the loss at the end of training, nats per token, as the mean over the seeds."""
        return self._means[fingerprint]

    def losses(self, fingerprint: str) -> list[float]:
        """Return the losses at all rungs, nats per token; the last one is the loss at the end."""
        row = self.row(fingerprint)
        return [float(row[f"loss_{rung}"]) for rung in range(1, RUNGS + 1)]

    def training_flops(self, fingerprint: str) -> float:
        """Return the FLOPs of a whole training: 3 times the FLOPs of the forward passes."""
        return 3 * float(self.row(fingerprint)["flops_per_token"]) * self.tokens


def write(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], file: Path = FILE) -> None:
    """Write rows as Parquet; `facts` on the recording go into its metadata.

    Latencies of the models that the file has stay.
    """
    table = pd.DataFrame(rows).sort_values(["seed", "trial"], ignore_index=True)
    if file.exists():
        known = pd.read_parquet(file)
        timed = known.drop_duplicates("fingerprint").set_index("fingerprint")
        for name in LATENCIES:
            if name in timed:
                table[name] = table["fingerprint"].map(timed[name])
        facts = {**facts, "latency": known.attrs.get("latency")}
    table.attrs.update(json.loads(json.dumps(facts)))
    save(table, file)


def save(table: pd.DataFrame, file: Path = FILE) -> None:
    """Write a table as Parquet; a run that is stopped meanwhile leaves the earlier file."""
    draft = file.with_suffix(".tmp")
    table.to_parquet(draft, index=False, compression="zstd")
    draft.replace(file)
