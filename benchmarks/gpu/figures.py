"""The groups in the order of their value, and what is expected of their figures and wanted."""

from __future__ import annotations

from dataclasses import dataclass

from gpu.report import Value, shown


@dataclass(frozen=True)
class Group:
    """Figures that one process measures."""

    name: str
    about: str
    seconds: int
    """The expected time."""
    limit: int
    """When it is ended, in seconds."""
    module: str = ""
    """The module of `measure`; empty: the module of the name."""
    function: str = "measure"
    turns: int = 1
    """Processes that measure the same, one after another; the spread between them is a figure."""


GROUPS = (
    Group("ceilings", "copies, products, launches, kernels of attention", 20, 60),
    Group("grouped", "torch's grouped_mm: values, gradients, speed, replay", 15, 40),
    Group("marked", "the tests that need a GPU: `make test-gpu`", 65, 110),
    Group("steps", "training steps, eager and captured; waits of the host; MFU", 50, 90),
    Group("same", "captured runs against eager ones; repeats bit for bit", 40, 70),
    Group("study", "a study of 12 candidates in one process", 100, 130),
    Group("layer", "an MoE layer over a dense one, and over transformers", 25, 50),
    Group("latency", "decoding and prefill, in three processes", 15, 40, turns=3),
    Group("memory", "peaks, growth, the gate of causality, weights", 30, 60),
    Group("mixers", "a step of each kind of mixer", 40, 60),
    Group(
        "ray", "the same study on Ray, 4 candidates on the GPU", 90, 130, "study", "measure_on_ray"
    ),
    Group("sharing", "four processes on the GPU against one", 60, 90),
)

SOURCES = {
    "card": "seen on other cards of this kind",
    "model": (
        "a model of a step on an H100, right to 40 %: 5.5 us for each launch, 1.8 us or more for a"
        " kernel, 2.6 TB/s, products at 350 to 450 TFLOP/s"
    ),
    "published": "published measurements of torch and of transformers on this kind of card",
    "rule": "what must hold",
}
"""Where an expectation comes from."""


@dataclass(frozen=True)
class Figure:
    """What is expected of one figure, and what is wanted."""

    name: str
    expected: tuple[float, float] | str = ""
    goal: tuple[str, Value] | None = None
    """A comparison (<=, >= or is) and what with."""
    unit: str = ""
    source: str = "model"
    dry: bool = True
    """Whether a run without a GPU gives it, too."""

    def expectation(self) -> str:
        """Write what is expected."""
        if isinstance(self.expected, str):
            return self.expected
        return " to ".join(dict.fromkeys(shown(x) for x in self.expected))

    def wish(self) -> str:
        """Write what is wanted."""
        if self.goal is None:
            return ""
        word, value = self.goal
        return shown(value) if word == "is" else f"{word} {shown(value)}"

    def met(self, value: Value) -> bool | None:
        """Return whether a value is what is wanted; None if nothing is."""
        if self.goal is None:
            return None
        word, wanted = self.goal
        if word == "is":
            return value is wanted if isinstance(wanted, bool) else value == wanted
        if isinstance(value, str) or isinstance(wanted, str):
            return False
        return value <= wanted if word == "<=" else value >= wanted


def _rule(*names: str) -> list[Figure]:
    """Return figures that must be yes."""
    return [Figure(name, "yes", ("is", True), source="rule") for name in names]


ROUTERS = ("auxiliary loss", "bias", "capacity", "threshold", "sinkhorn", "expert choice")
GROUPED = ("E16 32768 x 512 x 1024", "E64 131072 x 512 x 256", "E64 131072 x 1024 x 512")
STEPS = (
    "d512 L8 E64k8, 16k tokens",
    "d256 L8 E16k2, 2k tokens",
    "d256 L8 E16k2, 16k tokens",
    "d512 L8 E64k8, 2k tokens",
    "d1024 L12 E64k8, 16k tokens",
    "d256 L4 E8k2, 2k tokens",
)
TIMED = tuple(
    f"{model} {phase}"
    for model in ("d512 L8 E64k8", "d256 L4 E8k2", "d512 L4 dense")
    for phase in ("decode", "prefill")
)

FIGURES = (
    # --- ceilings
    Figure("ceilings/copy", (2.8, 4.4), unit="TB/s", source="card"),
    Figure("ceilings/product of 8192", (760.0, 800.0), unit="TFLOP/s", source="card"),
    Figure("ceilings/launch", (2.2, 3.5), unit="us"),
    Figure("ceilings/graph node", (1.0, 1.6), unit="us"),
    Figure("ceilings/kernel: causal, 2 of 8 heads, bfloat16", "cudnn", source="published"),
    Figure("ceilings/kernel: causal, 2 of 8 heads, float32", "math", source="published"),
    # --- grouped
    Figure("grouped/E16 32768 x 512 x 1024", (250.0, 400.0), unit="TFLOP/s", source="published"),
    Figure("grouped/E64 131072 x 512 x 256", (200.0, 350.0), unit="TFLOP/s", source="published"),
    *(Figure(f"grouped/{n}: error", goal=("<=", 1e-2), source="rule") for n in GROUPED),
    *_rule(*(f"grouped/{n}: replay is right" for n in GROUPED)),
    # --- marked
    Figure("marked/failed", goal=("is", 0), unit="tests", source="rule", dry=False),
    # --- steps
    *_rule(*(f"steps/{n}: host never waits" for n in STEPS)),
    Figure(f"steps/{STEPS[0]}: eager", (27.0, 35.0), unit="ms"),
    Figure(f"steps/{STEPS[0]}: graph", (23.0, 30.0), unit="ms"),
    Figure(f"steps/{STEPS[0]}: MFU", (12.0, 12.0), (">=", 19.0), "%"),
    Figure(f"steps/{STEPS[0]}: capture", goal=("<=", 1.0), unit="s"),
    Figure(f"steps/{STEPS[1]}: eager", (9.0, 14.0), unit="ms"),
    Figure(f"steps/{STEPS[1]}: graph", (4.0, 5.0), ("<=", 2.5), "ms"),
    Figure(f"steps/{STEPS[1]}: graph over eager", (0.4, 0.55), ("<=", 0.55)),
    Figure(f"steps/{STEPS[2]}: MFU", (10.0, 11.0), unit="%"),
    Figure(f"steps/{STEPS[3]}: graph", (7.6, 8.8), unit="ms"),
    Figure(f"steps/{STEPS[4]}: MFU", (18.0, 18.0), (">=", 27.0), "%"),
    Figure(f"steps/{STEPS[5]}: graph", (2.0, 2.5), unit="ms"),
    # --- same
    *_rule(*(f"same/{n}: captured is eager" for n in ROUTERS)),
    *_rule(*(f"same/{n}: two eager runs are bit-equal" for n in ROUTERS)),
    *_rule(*(f"same/{n}: two captured runs are bit-equal" for n in ROUTERS)),
    *_rule("same/two runs of train are bit-equal"),
    # --- study
    Figure("study/candidates an hour", (330.0, 650.0), (">=", 700.0)),
    Figure("study/failed", goal=("is", 0), unit="candidates", source="rule"),
    Figure("study/best loss", goal=("<=", 2.4), unit="nats/token"),
    Figure("study/seconds of train", (3.0, 7.0), unit="s"),
    Figure("study/seconds of causality", (0.4, 0.8), ("<=", 1.0), "s"),
    Figure("study/seconds of measure", goal=("<=", 2.0), unit="s"),
    Figure("study/left after a candidate", goal=("<=", 100.0), unit="MiB", source="rule"),
    # --- layer
    Figure("layer/d512 E16k2 f512: over dense", (1.6, 2.2), ("<=", 1.4)),
    Figure("layer/d512 E64k8 f128: over dense", (3.0, 4.5), ("<=", 2.0)),
    Figure("layer/d512 E64k8 f128: grouped_mm over dense", (2.5, 4.0)),
    Figure("layer/d512 E16k2 f512: over grouped_mm", goal=("<=", 0.85)),
    Figure("layer/d512 E64k8 f128: over grouped_mm", goal=("<=", 0.85)),
    # --- latency
    *_rule(*(f"latency/{n}: captured" for n in TIMED)),
    *_rule(*(f"latency/{n}: within its precision" for n in TIMED)),
    *(Figure(f"latency/{n}: spread of processes", (0.2, 1.0), ("<=", 0.5), "%") for n in TIMED),
    Figure("latency/d512 L8 E64k8 decode", (0.4, 1.2), unit="ms"),
    Figure("latency/d512 L8 E64k8 decode: eager", (1.5, 3.0), unit="ms", dry=False),
    # --- memory
    Figure("memory/peak: apart", goal=("<=", 0.1), unit="%", source="rule"),
    Figure("memory/growth in 100 eager steps", goal=("<=", 0.0), unit="MiB", source="rule"),
    Figure("memory/growth in 100 captured steps", goal=("<=", 0.0), unit="MiB", source="rule"),
    Figure("memory/gate of causality", (0.4, 0.8), ("<=", 1.0), "s"),
    Figure("memory/gate: second looks", goal=("is", 0)),
    Figure("memory/build", (0.5, 0.8), unit="s"),
    Figure("memory/weights to the host", (0.1, 0.2), unit="s"),
    Figure("memory/weights to bytes", (0.2, 0.4), unit="s"),
    # --- mixers
    Figure("mixers/attention", (2.0, 3.0), unit="ms"),
    Figure("mixers/window", (3.0, 6.0), unit="ms"),
    Figure("mixers/softcap", (12.0, 20.0), unit="ms"),
    Figure("mixers/mamba2", (10.0, 18.0), unit="ms"),
    Figure("mixers/gated delta", (10.0, 20.0), unit="ms"),
    Figure("mixers/kimi delta", (30.0, 60.0), unit="ms"),
    Figure("mixers/mamba", (50.0, 90.0), unit="ms"),
    # --- ray
    Figure("ray/candidates an hour", (400.0, 1000.0), (">=", 700.0)),
    Figure("ray/failed", goal=("is", 0), unit="candidates", source="rule"),
    Figure("ray/left on the card", goal=("<=", 64.0), unit="MiB", source="rule", dry=False),
    # --- sharing
    Figure("sharing/4 processes over 1, graph, 2k tokens", (1.0, 1.3), (">=", 1.0)),
    Figure("sharing/4 processes over 1, eager, 2k tokens", (1.8, 2.5), (">=", 2.0), dry=False),
    Figure("sharing/4 processes over 1, graph, 16k tokens", (1.0, 1.1), (">=", 1.0), dry=False),
)
