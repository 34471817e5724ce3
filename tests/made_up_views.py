"""Made-up studies with the shape of real ones, for the tests of what reads a View."""

from __future__ import annotations

import math
import random
from typing import Any

from moenas.records import Evaluation, Failure, FrontPoint, Plain, StudyRecord, View

OBJECTIVES: list[Plain] = [
    {"name": "val_loss", "direction": "minimize", "unit": "nats/token"},
    {"name": "decode_ms", "direction": "minimize", "unit": "ms/token"},
    {"name": "flops_per_token", "direction": "minimize", "unit": "FLOP/token"},
    {"name": "tokens_per_s", "direction": "maximize", "unit": "tokens/s"},
    {"name": "peak_memory", "direction": "minimize", "unit": "MB"},
]
DEVICE = {"key": "cpu:x", "kind": "cpu", "name": "Some CPU", "threads": 1, "dtype": "float32"}
DATA = {
    "name": "stdlib",
    "sha256": "ab" * 32,
    "files": 700,
    "bytes": 9_000_000,
    "entropy": [3.2, 2.4],
    "bigram_loss": 2.4,
}
ROUTER = {"score": "softmax", "top_k": 2, "balance": "aux_loss", "capacity_factor": None}


def architecture(rng: random.Random) -> Plain:
    """Return a canonical architecture; two in three have MoE layers."""
    experts = rng.choice([0, 4, 8])
    moe = {"kind": "moe", "n_experts": experts, "d_expert": 64, "activation": "swiglu"}
    dense = {"kind": "dense", "activation": "gelu", "d_ff": 256}
    return {
        "vocab_size": 256,
        "d_model": rng.choice([64, 96, 128]),
        "norm": "rmsnorm",
        "tie_embeddings": True,
        "blocks": [
            {
                "repeat": rng.choice([2, 3]),
                "vary": False,
                "mixer": {"kind": "attention", "head_dim": 32, "n_heads": 3, "n_kv_heads": 1},
                "ffn": moe | {"router": ROUTER} if experts else dense,
            }
        ],
    }


DOMAINS = ("modules", "asyncio", "a package of a long name", *"abcde", "other")


def routing(layer: int, load: list[float]) -> Plain:
    """Return the routing of a layer; each domain prefers an expert of its own."""
    domains = {}
    for i, name in enumerate(DOMAINS):
        slots = [x + (2.0 if j == i else 0.0) for j, x in enumerate(load)]
        domains[name] = [x / sum(slots) for x in slots]
    return {"layer": layer, "load": load, "max_vio": 0.3, "domains": domains}


def drifting(row: Plain, share: float) -> Plain:
    """Return the routing of a layer at a share of the run: even at first."""
    load = [1 + share * (x - 1) for x in row["load"]]
    return {"layer": row["layer"], "load": load}


def evaluation(trial: int, plain: Plain, rng: random.Random, objectives: list[Plain]) -> Evaluation:
    """Return a complete evaluation: cheap candidates lose more, with noise."""
    size = rng.lognormvariate(0, 0.7)
    loss = 1.5 + 0.5 / size + rng.random() * 0.2
    values = {
        "val_loss": loss,
        "decode_ms": 0.5 * size**0.5 * (0.8 + 0.4 * rng.random()),
        "flops_per_token": 1e6 * size * (0.7 + 0.6 * rng.random()),
        "tokens_per_s": 900 / size,
        "peak_memory": 30 * size * rng.random() + 20,
    }
    ffn, layers = plain["blocks"][0]["ffn"], plain["blocks"][0]["repeat"]
    curve = [
        {
            "tokens": 2048 * (i + 1),
            "train_loss": loss + 3.5 * math.exp(-i / 20) + rng.gauss(0, 0.05),
        }
        for i in range(120)
    ]
    experts = ffn.get("n_experts", 0)
    load = [[rng.expovariate(1) for _ in range(experts)] for _ in range(layers)]
    rows = [routing(i, row) for i, row in enumerate(load) if row]
    for i, point in enumerate(curve[::3] if rows else ()):
        point["routing"] = [drifting(row, i / 40) for row in rows]
    return Evaluation(
        study="made_up",
        trial=trial,
        attempt=1,
        status="complete",
        fingerprint=f"{trial:016x}",
        values={o["name"]: values[o["name"]] for o in objectives},
        measurements={"decode_ms": {"ratio": 1.1, "spread": 0.02, "n": 30}},
        metrics={"val_loss": loss, "bits_per_byte": loss / math.log(2)},
        curve=curve,
        routing=rows,
        cost={"params": 1_234_567, "active_params": 345_678, "flops_per_token": 1_000_000},
        seconds={"train": 12.0, "total": 14.0},
        device=dict(DEVICE),
        versions={"torch": "2.13.0"},
        data={"name": "stdlib", "sha256": "ab" * 32},
        weights_sha256="cd" * 32,
    )


def dominates(a: Evaluation, b: Evaluation, directions: dict[str, str]) -> bool:
    """Return whether `a` is nowhere worse than `b` and somewhere better."""
    signs = {name: 1 if d == "minimize" else -1 for name, d in directions.items()}
    gaps = [signs[name] * (a.values[name] - b.values[name]) for name in directions]
    return all(gap <= 0 for gap in gaps) and any(gap < 0 for gap in gaps)


def history(
    done: list[Evaluation], directions: dict[str, str]
) -> tuple[list[int], list[FrontPoint]]:
    """Return the front, and how it came about; the hypervolume is made up but never falls."""
    front: list[Evaluation] = []
    points = []
    for new in done:
        entered = not any(dominates(old, new, directions) for old in front)
        left = [old.trial for old in front if entered and dominates(new, old, directions)]
        front = [old for old in front if old.trial not in left] + ([new] if entered else [])
        before = points[-1].hypervolume if points else 1.0
        volume = before * (1.2 if entered else 1.0)
        points.append(FrontPoint(new.trial, volume, entered, left, len(front)))
    first = next(iter(directions))
    sign = 1 if directions[first] == "minimize" else -1
    return [e.trial for e in sorted(front, key=lambda e: sign * e.values[first])], points


def view(n_complete: int = 40, n_objectives: int = 3, n_failed: int = 3, **study: Any) -> View:
    """Return a made-up study: complete candidates, then failed ones and one infeasible."""
    rng = random.Random(0)
    chosen = [{**o, "doc": "", "sha256": ""} for o in OBJECTIVES[:n_objectives]]
    architectures = {i: architecture(rng) for i in range(n_complete + n_failed + 1)}
    done = [evaluation(i, architectures[i], rng, chosen) for i in range(n_complete)]
    directions = {o["name"]: o["direction"] for o in chosen}
    front, points = history(done, directions)
    failure = Failure("diverged", "loss is nan")
    rising = [{"tokens": 2048 * (i + 1), "train_loss": 5.0 + 0.1 * i} for i in range(20)]
    rising.append({"tokens": 2048 * 21, "train_loss": math.nan})
    rest = [
        Evaluation("made_up", n_complete + i, 1, "failed", "f" * 16, curve=rising, failure=failure)
        for i in range(n_failed)
    ]
    broken = {"active_params < 2e6": 0.4}
    rest.append(
        Evaluation("made_up", n_complete + n_failed, 1, "infeasible", "0" * 16, violations=broken)
    )
    record: dict[str, Any] = {
        "name": "made_up",
        "space_text": "",
        "overrides": [],
        "space": {},
        "space_sha256": "",
        "objectives": chosen,
        "data": dict(DATA),
        "versions": {"torch": "2.13.0", "moenas": "0.1.0"},
        "trials": n_complete + n_failed + 1,
        "reference_point": {o["name"]: 3.0 for o in chosen} if done else {},
    }
    return View(StudyRecord(**(record | study)), done + rest, architectures, front, points)
