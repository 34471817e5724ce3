"""Contract tests for users' files: components, objectives, figures and corpora."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moenas import resources
from moenas.data import loading as data
from moenas.errors import InputError, SpaceError
from moenas.evaluate.job import evaluate
from moenas.export import source
from moenas.failures import error_line
from moenas.grammar import tree
from moenas.grammar.component import Component, Field, Part, fields
from moenas.model.architecture import Architecture, Model
from moenas.model.feedforward.dense import FFN
from moenas.model.layer_inputs import LayerIndexed
from moenas.model.mixers.mixer import Mixer
from moenas.model.moe.experts import MoEFFN
from moenas.model.moe.scores import Score
from moenas.model.moe.selection import Selection
from moenas.records import (
    CurvePoint,
    Evaluation,
    Failure,
    FrontPoint,
    Job,
    ObjectiveInfo,
    Plain,
    RoutingRow,
    StudyRecord,
    View,
)
from moenas.space.objective import Objective, load_objective
from moenas.space.sections import Protocol, Recipe

TRIES = 200
"""Random fields drawn for a component before they are called impossible to meet."""
FORMER_FLAGS = {"stand": "LayerIndexed", "reads_tokens": "ReadsInputs", "lends": "ReadsInputs"}
"""Attributes by which a module once asked for more than the tokens -> its base class now."""
BATCH, TOKENS = 2, 12
"""Size of the batches that parts are tried on."""


# --- random architectures -----------------------------------------------------------------------


def random_architecture(
    seed: int, kind: type[Component] | None = None, **given: Any
) -> Architecture:
    """Return a valid architecture with every field at random, as small as the fields allow.

    With a `kind` of mixer or feed-forward layer, every layer has it. With a `kind` of score or
    selection, every layer is a mixture of experts whose router has it. `given` sets fields of the
    architecture, e.g. `vocab_size=256`.

    Raises:
        InputError: if no draw is valid; then the bounds of the fields are too wide.
    """
    rng = random.Random(seed)
    reason = ""
    for _ in range(TRIES):
        try:
            return Architecture.parse(_draw(Architecture, rng, kind) | given)
        except SpaceError as error:
            reason = str(error)
    raise InputError(f"{kind or Architecture}: no random fields are valid; the last: {reason}")


def _draw(family: type[Component], rng: random.Random, kind: type[Component] | None) -> Plain:
    """Draw fields of a family that go together, as plain data; no other kind looks ahead."""
    reason = "it looks at later tokens"
    for _ in range(TRIES):
        plain = _draw_once(family, rng, kind)
        try:
            component = tree.parse(family, plain)
        except SpaceError as error:
            reason = str(error)
            continue
        if getattr(component, "causal", True) or not getattr(kind, "causal", True):
            return plain
    raise InputError(f"{kind or family}: no random fields are valid; the last: {reason}")


def _draw_once(family: type[Component], rng: random.Random, kind: type[Component] | None) -> Plain:
    """Draw each field by itself."""
    cls = family
    if family.kinds and family.kind is None:
        wanted = kind if kind is not None and issubclass(kind, family) else _part_with(kind)
        fixed = wanted is not None and issubclass(wanted, family)
        cls = wanted if fixed and wanted else rng.choice(list(family.kinds.values()))
    plain: Plain = {} if cls.kind is None else {"kind": cls.kind}
    for name, field in fields(cls).items():
        if field.component is not None and field.optional and _left_out(field, rng, kind, plain):
            plain[name] = None
        elif field.component is not None and field.is_list:
            plain[name] = [_draw(field.component, rng, kind) for _ in range(rng.randint(1, 2))]
        elif field.component is not None:
            plain[name] = _draw(field.component, rng, kind)
        else:
            plain[name] = _draw_scalar(field, rng)
    return plain


def _part_with(kind: type[Component] | None) -> type[Component] | None:
    """Return the kind of part that can hold a kind of any family."""
    return MoEFFN if kind is not None and issubclass(kind, Score | Selection) else kind


def _left_out(field: Field, rng: random.Random, kind: type[Component] | None, plain: Plain) -> bool:
    """Whether a component that may be null is: a pattern always, the first of the kind never."""
    kind = _part_with(kind)
    wanted = kind is not None and field.component is not None and issubclass(kind, field.component)
    drawn = [part.get("kind") for part in plain.values() if isinstance(part, dict)]
    first = wanted and kind is not None and kind.kind not in drawn
    return field.is_list or (not first and rng.random() < 0.2)


def _draw_scalar(field: Field, rng: random.Random) -> Any:
    """Draw a value near the low end of a field; text without choices keeps its default."""
    if field.optional and rng.random() < 0.5:
        return None
    if field.choices:
        return rng.choice(field.choices)
    if bool in field.scalars:
        return rng.random() < 0.5
    if int in field.scalars:
        step = field.multiple or 1
        first = -(-int(field.low or 0) // step)
        last = first + 3 if field.high is None else min(first + 3, int(field.high) // step)
        return step * rng.randint(first, last)
    if float in field.scalars and (field.required or field.optional or rng.random() < 0.5):
        low = field.low or 0.0
        return rng.uniform(low, low + 2.0 if field.high is None else field.high)
    return field.default


# --- parts ---------------------------------------------------------------------------------------


def check_part(kind: type[Component], instances: int = 10) -> None:
    """Check a kind of mixer, feed-forward layer, score or selection inside random small models.

    Plain data read back as the same part. The cost equals the cost of the built model. The seed
    sets all weights. The output is finite, looks at no later token, and is the same with a cache.
    Every parameter gets a gradient. The code can be exported.

    Raises:
        InputError: naming the part, its fields and what does not hold.
    """
    if not issubclass(kind, Mixer | FFN | Score | Selection):
        raise InputError(
            f"{kind.__name__}: not a kind of mixer, feed-forward layer, score or selection"
        )
    for seed in range(instances):
        architecture = random_architecture(seed, kind)
        try:
            with _nothing_uninitialised():
                problem = _problem(architecture)
        except InputError as error:
            problem = str(error)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = error_line(error)
        if problem is not None:
            part = json.dumps(architecture.plain()["blocks"][0])
            raise InputError(
                f"{inspect.getsourcefile(kind)}: {kind.__name__}: {problem}"
                f" (d_model {architecture.d_model}, layer {part})"
            )


@contextmanager
def _nothing_uninitialised() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN meanwhile, so that its use shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _problem(architecture: Architecture) -> str | None:
    """Return what does not hold of the parts of an architecture, or None."""
    if Architecture.parse(json.loads(json.dumps(architecture.plain()))) != architecture:
        return "plain() does not read back as the same part"
    canonical = architecture.canonical()
    if canonical.canonical() != canonical:
        return "canonical() of a canonical part is another one"
    if canonical.cost(TOKENS) != architecture.cost(TOKENS):
        return "the canonical part has another cost"
    model, cost = architecture.build(seed=1), architecture.cost(TOKENS)
    built = sum(p.numel() for p in model.parameters())
    if cost.params != built:
        return f"cost() counts {cost.params} parameters in the model, build() makes {built}"
    if cost.active_params > cost.params:
        return "cost() counts more active parameters than parameters"
    wild = [n for n, p in model.state_dict().items() if not p.isfinite().all()]
    if wild:
        return f"the seed does not set {wild[0]}; give it a value in the constructor"
    source.SourceClosure.of(source.record(architecture.build)[1], ["forward"]).texts()
    layers = tuple(layer.canonical_at(architecture.d_model) for layer in architecture.layers)
    twin = replace(architecture, blocks=layers).build(seed=1).eval()
    for (_, module), part in zip(model.parts(), _configs(architecture), strict=True):
        if part.layer_indexed and not isinstance(module, LayerIndexed):
            name = type(module).__name__
            return f"layer_indexed is True, so {name} must derive from moenas.model.LayerIndexed"
        if former := [name for name in FORMER_FLAGS if hasattr(module, name)]:
            return (
                f"'{former[0]}' of {type(module).__name__} is not read any more; derive from"
                f" moenas.model.{FORMER_FLAGS[former[0]]}"
            )
    causal = all(layer.ffn is None or layer.ffn.causal for layer in architecture.layers)
    return _forward_problem(model.eval(), twin, causal) or _gradient_problem(model.train())


def _configs(architecture: Architecture) -> list[Part]:
    """Return the configs of the parts of an architecture in the order of `Model.parts`."""
    return [part for layer in architecture.layers for part in layer.parts.values()]


@torch.no_grad()
def _forward_problem(model: Model, twin: Model, causal: bool) -> str | None:
    """Compare logits: after a change of the last token, and token by token with a cache."""
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) * 5 % model.vocab_size
    logits = model(tokens)
    if not logits.isfinite().all():
        return "the output is not finite; uninitialised memory is read"
    if not _close(twin(tokens), logits):
        return "the canonical part computes something else"
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % model.vocab_size
    if causal and not _close(model(later)[:, :-1], logits[:, :-1]):
        return "the output at a token depends on a later token"
    cache, parts = model.new_cache(BATCH, TOKENS), []
    for part in tokens.split([TOKENS // 2, 1, TOKENS - TOKENS // 2 - 1], dim=1):
        parts.append(model(part, cache))
    if causal and not _close(torch.cat(parts, dim=1), logits):
        return "the output differs when decoding with a cache"
    if not model(tokens, dtype=torch.bfloat16).isfinite().all():
        return "the output is not finite in bfloat16"
    return None


def _close(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, rtol=1e-3, atol=1e-4)


def _gradient_problem(model: Model) -> str | None:
    """Take a gradient of the loss that training uses."""
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) * 3 % model.vocab_size
    (model.loss(tokens, tokens.roll(-1, 1)) + model.auxiliary_loss()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            return f"no gradient reaches {name}"
        if not parameter.grad.isfinite().all():
            return f"the gradient of {name} is not finite"
    return None


# --- objectives ----------------------------------------------------------------------------------


def check_objective(path: Path) -> dict[str, float]:
    """Measure a dense and a sparse small model by an objective file; return both values.

    Raises:
        InputError: naming file and line of what is missing or wrong.
    """
    objective = load_objective(str(path))
    networks: dict[str, Plain] = {
        "dense": {"kind": "dense", "d_ff": 64},
        "moe": {"kind": "moe", "n_experts": 4, "d_expert": 32},
    }
    return {name: _measured(objective, _small(ffn)) for name, ffn in networks.items()}


def _small(ffn: Plain) -> Architecture:
    """Return a model of two layers of attention, so that an objective of a cache is not 0."""
    block = {"repeat": 2, "mixer": {"kind": "attention", "head_dim": 16}, "ffn": ffn}
    return Architecture.parse({"vocab_size": 256, "d_model": 32, "blocks": [block]})


def _measured(objective: Objective, architecture: Architecture) -> float:
    """Evaluate an architecture as a study would, on two steps of training."""
    section: Plain = {"kind": "pydoc"}
    job = Job(
        study="check",
        trial=0,
        attempt=1,
        architecture=architecture.canonical().plain(),
        objectives={objective.name: objective.source},
        data=section,
        data_sha256=data.load(section).sha256,
        train=Recipe(tokens=256, context=32, batch=4, val_tokens=256).plain(),
        measure=Protocol(
            decode_batch=1, decode_context=8, prefill_tokens=8, min_repeats=3, max_seconds=0.2
        ).plain(),
        seed=0,
    )
    evaluation, _ = evaluate(job)
    if evaluation.failure is not None:
        message = evaluation.failure.message
        raise InputError(message if objective.path in message else f"{objective.path}: {message}")
    return evaluation.values[objective.name]


# --- figures -------------------------------------------------------------------------------------


def check_figure(path: Path) -> None:
    """Draw a figure file for a study without trials, and for one with every kind of trial.

    Raises:
        InputError: naming the file and what is missing or wrong.
    """
    module = resources.load_module(path)
    if not (module.__doc__ or "").strip():
        raise InputError(f"{path}:1: the docstring is missing; its first line is the title")
    if not callable(getattr(module, "figure", None)):
        raise InputError(f"{path}: 'figure' is missing; write def figure(view) -> go.Figure")
    for what, view in (("no trial", _view(0)), ("8 trials", _view(8))):
        try:
            drawn = json.loads(module.figure(view).to_json())
        except Exception as error:
            raise InputError(
                f"{path}: figure(view) of a study with {what} gives no plotly figure:"
                f" {type(error).__name__}: {error}"
            ) from error
        if not isinstance(drawn, dict) or "data" not in drawn:
            raise InputError(f"{path}: figure(view) must give a plotly.graph_objects.Figure")


def _view(trials: int) -> View:
    """Make up a study with two objectives in which every third trial has no values."""
    infos = [
        ObjectiveInfo("val_loss", "minimize", "nats/token", "Validation loss.", ""),
        ObjectiveInfo("decode_ms", "minimize", "ms/step", "Time of a step.", ""),
    ]
    study = StudyRecord(
        name="check",
        space_text="",
        overrides=[],
        space={},
        space_sha256="",
        objectives=[info.plain() for info in infos],
        data={"name": "made up", "entropy": [3.2, 2.4], "bigram_loss": 2.4},
        versions={},
        trials=trials,
        reference_point={"val_loss": 4.0, "decode_ms": 20.0} if trials else {},
    )
    architectures = [random_architecture(i, vocab_size=256).canonical() for i in range(trials)]
    evaluations = [_evaluation(i, architecture) for i, architecture in enumerate(architectures)]
    complete = [e.trial for e in evaluations if e.status == "complete"]
    history = [FrontPoint(t, 1.0 + t, True, [], i + 1) for i, t in enumerate(complete)]
    plains = {i: architecture.plain() for i, architecture in enumerate(architectures)}
    return View(study, evaluations, plains, complete, history)


def _evaluation(trial: int, architecture: Architecture) -> Evaluation:
    """Make up the result of a trial: later ones are better and slower."""
    known: Plain = {"study": "check", "trial": trial, "attempt": 1}
    known |= {"fingerprint": architecture.fingerprint, "cost": architecture.cost(TOKENS).plain()}
    if trial % 3 == 2:
        reason = Failure("diverged", "made up")
        if trial % 2:
            return Evaluation(**known, status="infeasible", violations={"params < 1": 1.0})
        return Evaluation(**known, status="failed", failure=reason)
    loss = 3.0 - 0.1 * trial
    row: CurvePoint = {
        "tokens": 100,
        "train_loss": loss,
        "lr": 0.01,
        "grad_norm": 1.0,
        "seconds": 1.0,
    }
    health: RoutingRow = {"max_vio": 1.0, "cv": 0.5, "entropy": 0.9, "dead": 0, "dropped": 0.0}
    layers = [i for i, layer in enumerate(architecture.layers) if isinstance(layer.ffn, MoEFFN)]
    return Evaluation(
        **known,
        status="complete",
        values={"val_loss": loss, "decode_ms": 1.0 + trial},
        measurements={"decode_ms": {"ratio": 1.0, "spread": 0.1, "n": 10, "reference_ms": 1.0}},
        metrics={"val_loss": loss, "lr": 0.01},
        curve=[row, {**row, "tokens": 200, "val_loss": loss}],
        routing=[{"layer": i, "load": [3, 1], **health} for i in layers],
        device={"key": "cpu", "name": "made up"},
    )


# --- corpora -------------------------------------------------------------------------------------


def check_source(section: Plain) -> None:
    """Check the corpus of a `data` section.

    Tokens are below its vocabulary. Targets are the tokens one place later. Batches are the same
    when asked for again, and differ by step and seed. Validation windows do not overlap.

    Raises:
        InputError: naming the corpus and what does not hold.
    """
    corpus, context = data.load(section), 16
    corpus.require(context, corpus.vocab_size)
    batches = [corpus.batch(step, 4, context, seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    windows = [t for t, _ in corpus.val_batches(context, 4, 4 * context)]
    problems = {
        "a batch is not int64 of (batch, context)": any(
            part.shape != (4, context) or part.dtype != torch.int64 for b in batches for part in b
        ),
        "targets are not the tokens one place later": any(
            not torch.equal(tokens[:, 1:], targets[:, :-1]) for tokens, targets in batches
        ),
        "tokens are not below vocab_size": any(
            int(t.min()) < 0 or int(t.max()) >= corpus.vocab_size for t, _ in batches
        ),
        "a batch is another one when asked for again": not torch.equal(
            corpus.batch(0, 4, context, 0)[0], batches[0][0]
        ),
        "batches do not differ by step and seed": any(
            torch.equal(batches[0][0], other) for other, _ in batches[1:]
        ),
        "validation gives no windows, or too many": not 1 <= sum(map(len, windows)) <= 4,
        "the digest is another one when loaded again": data.load(section).sha256 != corpus.sha256,
    }
    for problem, values in problems.items():
        if values:
            raise InputError(f"data '{corpus.name}': {problem}")


# --- files ---------------------------------------------------------------------------------------


def check_file(path: Path) -> Iterator[str]:
    """Check a Python file by its definitions; yield a line for each check that passes.

    Raises:
        InputError: naming what does not hold, or saying that the file defines nothing of ours.
    """
    module = resources.load_module(path)
    nothing = True
    for kind in vars(module).values():
        own = isinstance(kind, type) and kind.__module__ == module.__name__
        if own and issubclass(kind, Component) and kind.kind is not None:
            check_part(kind)
            yield f"{path}: the component '{kind.kind}' passes the contract test (10 random models)"
            nothing = False
        if own and any(base.__name__ == "BaseSampler" for base in kind.__mro__[1:]):
            use = f"search.sampler={path}:{kind.__name__}"
            yield f"{path}: '{kind.__name__}' is a sampler; a study uses it by {use}"
            nothing = False
    if hasattr(module, "measure"):
        unit = load_objective(str(path)).unit
        values = ", ".join(f"{k} {v:.6g} {unit}".rstrip() for k, v in check_objective(path).items())
        yield f"{path}: objective '{path.stem}' passes the contract test; small models: {values}"
        nothing = False
    if hasattr(module, "figure"):
        check_figure(path)
        yield f"{path}: the figure '{path.stem}' passes the contract test with 0 and 8 trials"
        nothing = False
    if nothing:
        raise InputError(
            f"{path}: defines no part (a class with a kind), no objective (measure) and no figure"
            " (figure), nor a sampler (a class derived from optuna.samplers.BaseSampler); see docs/"
            " for what each takes"
        )
