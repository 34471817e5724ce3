"""An architecture counts itself exactly and becomes a causal, repeatable language model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from counter import count_on_meta
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moenas.errors import SpaceError
from moenas.grammar import sampling, tree
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.resources import Node

ATTENTION: Plain = {"kind": "attention", "head_dim": 8, "n_kv_heads": 1}
DENSE: Plain = {"kind": "dense", "d_ff": 24}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 16, "router": {"top_k": 2}}


def plain(*blocks: Plain, **fields: Any) -> Plain:
    return {"vocab_size": 30, "d_model": 16, "blocks": list(blocks), **fields}


def block(ffn: Plain, mixer: Plain = ATTENTION, **fields: Any) -> Plain:
    return {"mixer": mixer, "ffn": ffn, **fields}


def moe(**fields: Any) -> Plain:
    router = fields.pop("router", {"top_k": 2})
    return block({**MOE, "router": router, **fields})


def parse(*blocks: Plain, **fields: Any) -> Architecture:
    return Architecture.parse(plain(*blocks, **fields))


def some_tokens(batch: int = 2, length: int = 12, vocab: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


EVERYTHING = parse(
    moe(router={"preset": "switch"}, activation="geglu"),
    moe(router={"preset": "deepseek_v3", "top_k": 2}, n_shared_experts=1),
    block(DENSE, {"kind": "attention", "head_dim": 8, "qk_norm": "head"}),
    moe(router={"preset": "olmoe", "top_k": 3}, activation="relu2"),
    norm="layernorm",
    tie_embeddings=False,
)
"""A layer of every sort."""

SPACE = plain(
    {
        "repeat": {"int": [1, 3]},
        "mixer": {
            "kind": "attention",
            "head_dim": {"choice": [8, 16]},
            "n_heads": {"choice": [None, 2, 4]},
            "n_kv_heads": {"choice": [None, 1, 2]},
            "qk_norm": {"choice": ["none", "head"]},
        },
        "ffn": {
            "choice": [
                {
                    "kind": "dense",
                    "d_ff": {"int": [8, 40], "step": 8},
                    "activation": {"choice": ["swiglu", "geglu", "reglu", "gelu", "relu2"]},
                },
                {
                    "kind": "moe",
                    "n_experts": {"int": [3, 9]},
                    "d_expert": {"int": [8, 24]},
                    "activation": {"choice": ["swiglu", "relu2"]},
                    "n_shared_experts": {"int": [0, 2]},
                    "d_shared": {"choice": [None, 8, 40]},
                    "router": {
                        "choice": [
                            {
                                "top_k": {"int": [1, 3]},
                                "normalize": {"choice": [True, False]},
                                "score": {"choice": ["softmax", "sigmoid"]},
                                "balance": {"choice": ["none", "aux_loss", "bias"]},
                                "capacity_factor": {"choice": [None, 1.0]},
                            },
                            {"preset": "switch"},
                            {"preset": "deepseek_v3", "top_k": 2},
                        ]
                    },
                },
            ]
        },
        "vary": True,
    },
    d_model={"choice": [16, 32, 48]},
    vocab_size={"int": [2, 300]},
    norm={"choice": ["rmsnorm", "layernorm"]},
    tie_embeddings={"choice": [True, False]},
)
TREE = tree.read(Architecture, Node.wrap(SPACE))

seeds = st.integers(0, 2**32)


def drawn(seed: int) -> Architecture:
    """A random valid architecture of the wide space."""
    while True:
        try:
            return Architecture.parse(sampling.draw(TREE, sampling.RandomSuggest(seed)))
        except SpaceError:
            seed += 1


# --- cost ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_parameters_are_counted_exactly(seed: int) -> None:
    architecture = drawn(seed)
    model = architecture.build("meta")
    cost = architecture.cost(context=16)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 2 * cost.params


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_active_parameters_are_those_of_the_same_model_with_the_idle_experts_gone(
    seed: int,
) -> None:
    architecture = drawn(seed)
    model = architecture.build("meta")
    idle = 0 if architecture.tie_embeddings else (model.vocab_size - 1) * model.d_model
    for _, layer in model.moe_layers():
        one_expert = sum(p[0].numel() for p in layer.experts.parameters())
        idle += (layer.experts.n_experts - layer.router.top_k) * one_expert
    cost = architecture.cost(context=16)
    assert cost.active_params == cost.params - idle


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(2, 20))
def test_flops_are_those_that_torch_counts(seed: int, batch: int, context: int) -> None:
    architecture = drawn(seed)
    model = architecture.build("meta").eval()
    wanted = architecture.cost(context).flops_per_token * batch * context
    assert count_on_meta(model, batch, context) == wanted


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 5))
def test_the_cache_grows_by_what_the_cost_says(seed: int, length: int) -> None:
    architecture = drawn(seed)
    model = architecture.build().eval()
    cache = model.new_cache(1, length)
    model(torch.zeros(1, length, dtype=torch.long), cache, dtype=torch.bfloat16)
    held = sum(c.keys.nbytes + c.values.nbytes for c in cache)
    assert held == length * architecture.cost(length).kv_bytes_per_token


def test_a_known_architecture_costs_what_pencil_and_paper_say() -> None:
    cost = parse(block(DENSE), moe(n_shared_experts=1, d_shared=8)).cost(context=10)
    attention = 16 * (16 + 2 * 8) + 16 * 16
    dense, expert, shared, router = 3 * 16 * 24, 3 * 16 * 16, 3 * 16 * 8, 16 * 4
    rest = 2 * attention + dense + shared + router + 30 * 16
    norms = 5 * 16
    assert cost.params == rest + norms + 4 * expert
    assert cost.active_params == rest + norms + 2 * expert
    assert cost.flops_per_token == 2 * (rest + 2 * expert) + 2 * (2 * 2 * 10 * 16)
    assert cost.kv_bytes_per_token == 2 * (2 * 2 * 8)


# --- the model ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seeds, st.booleans(), st.integers(1, 9))
def test_later_tokens_never_change_earlier_logits(seed: int, training: bool, cut: int) -> None:
    architecture = drawn(seed)
    model = architecture.build(seed=seed).train(training)
    tokens = some_tokens(2, 10, architecture.vocab_size)
    other = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 1) % architecture.vocab_size), dim=1)
    torch.testing.assert_close(model(tokens)[:, :cut], model(other)[:, :cut], rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_a_sequence_does_not_depend_on_its_neighbours_in_the_batch(seed: int) -> None:
    architecture = drawn(seed)
    model = architecture.build(seed=seed)
    tokens = some_tokens(3, 8, architecture.vocab_size)
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole(seed: int) -> None:
    architecture = drawn(seed)
    model = architecture.build(seed=seed).eval()
    tokens = some_tokens(2, 9, architecture.vocab_size)
    cache = model.new_cache(2, 9)
    pieces = [model(piece, cache) for piece in tokens.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=0, atol=1e-5)


def test_generation_takes_the_most_likely_token_each_time() -> None:
    model = EVERYTHING.build(seed=1).eval()
    start = some_tokens(2, 3)
    tokens = start
    for _ in range(6):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(start, 6), tokens)


def test_generation_is_in_evaluation_mode_and_leaves_the_mode_alone() -> None:
    router = {
        "preset": "switch",
        "capacity_factor": 0.5,
        "logits": {"kind": "linear", "jitter": 0.3},
    }
    model = parse(moe(router=router)).build(seed=1)
    start = some_tokens(4, 8)
    wanted = model.eval().generate(start, 6)
    for training in (True, False):
        assert torch.equal(model.train(training).generate(start, 6), wanted)
        assert {module.training for module in model.modules()} == {training}
    assert torch.equal(model.generate(start, 0), start)


@pytest.mark.parametrize(
    ("shape", "n", "reason"),
    [
        ((2, 0), 3, r"not \(2, 0\)"),
        ((4,), 3, r"tokens are \(B, S\)"),
        ((2, 3), -1, "at least 0, not -1"),
    ],
)
def test_generation_refuses_what_it_cannot_continue(
    shape: tuple[int, ...], n: int, reason: str
) -> None:
    model = parse(block(DENSE)).build().train()
    with pytest.raises(ValueError, match=reason):
        model.generate(torch.zeros(shape, dtype=torch.int64), n)
    assert model.training


def test_a_seed_fixes_every_bit_of_weights_and_training() -> None:
    def trained() -> dict[str, Tensor]:
        model = EVERYTHING.build(seed=7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            train_step(model, optimizer, some_tokens(seed=step))
        return model.state_dict()

    torch.manual_seed(1)
    first = trained()
    torch.manual_seed(2)
    second = trained()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = EVERYTHING.build(seed=8).state_dict()
    assert not torch.equal(EVERYTHING.build(seed=7).state_dict()["embedding"], other["embedding"])


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    EVERYTHING.build(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, tokens: Tensor, dtype: torch.dtype | None = None
) -> float:
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], dtype)
    optimizer.zero_grad()
    (loss + model.auxiliary_loss()).backward()
    optimizer.step()
    model.after_step()
    return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_learns_a_sequence_by_heart(dtype: torch.dtype) -> None:
    model = EVERYTHING.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = some_tokens(4, 16)
    losses = [train_step(model, optimizer, tokens, dtype) for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(30), abs=0.6)
    assert losses[-1] < 0.3 * losses[0]


def test_a_gradient_reaches_every_parameter() -> None:
    model = EVERYTHING.build(seed=0)
    tokens = some_tokens(8, 32)
    (model.loss(tokens[:, :-1], tokens[:, 1:]) + model.auxiliary_loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_computing_in_bfloat16_keeps_float32_masters_and_logits() -> None:
    model = EVERYTHING.build(seed=0).eval()
    full, half = model(some_tokens()), model(some_tokens(), dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < (full - half).abs().max() < 0.1
    assert model.to(torch.bfloat16)(some_tokens()).dtype == torch.float32


def test_auxiliary_losses_are_weighted_and_added_over_the_layers() -> None:
    model = EVERYTHING.build(seed=0)
    model(some_tokens())
    layers = dict(model.moe_layers())
    assert list(layers) == [0, 1, 3]
    switch, olmoe = layers[0].routing, layers[3].routing
    mean = (0.01 * olmoe.balance_loss + 0.001 * olmoe.z_loss) / 3  # of the mixtures
    wanted = 0.01 * switch.balance_loss + mean
    torch.testing.assert_close(model.auxiliary_loss(), wanted)
    assert parse(block(DENSE)).build().auxiliary_loss() == 0


def test_a_step_moves_the_biases_that_balance_and_no_others() -> None:
    model = EVERYTHING.build(seed=0)
    model(some_tokens())
    model.after_step()
    biases = {i: layer.balance.bias for i, layer in model.moe_layers()}
    assert biases[0] is None
    assert biases[3] is None
    assert biases[1] is not None
    load = model.blocks[1].ffn.routing.load.float()
    torch.testing.assert_close(biases[1], 0.001 * torch.sign(load.mean() - load))
    assert biases[1].any()


def test_the_start_has_the_stated_deviations() -> None:
    architecture = parse(block(DENSE, repeat=8), d_model=128, vocab_size=512)
    model = architecture.build(seed=0)
    std = math.sqrt(2 / (5 * 128))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_residual = name.endswith(("out.weight", "down.weight"))
            wanted = std / 4 if into_residual else std
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name


def test_every_module_keeps_the_arguments_that_it_was_built_with() -> None:
    for module in EVERYTHING.build("meta").modules():
        if type(module).__module__.startswith("moenas"):
            code = type(module).__init__.__code__
            for name in code.co_varnames[1 : code.co_argcount]:
                assert hasattr(module, name), (type(module), name)


# --- spellings ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_plain_data_goes_both_ways_and_the_canonical_form_is_stable(seed: int) -> None:
    architecture = drawn(seed)
    assert Architecture.parse(architecture.plain()) == architecture
    canonical = architecture.canonical()
    assert canonical.canonical() == canonical
    assert Architecture.parse(canonical.plain()) == canonical
    assert canonical.fingerprint == architecture.fingerprint
    assert canonical.cost(32) == architecture.cost(32)
    assert len(canonical.layers) == len(architecture.layers)


@settings(max_examples=12, deadline=None)
@given(seeds)
def test_the_canonical_form_computes_and_trains_alike(seed: int) -> None:
    architecture = drawn(seed)
    models = [architecture.build(seed=1), architecture.canonical().build(seed=1)]
    tokens = some_tokens(2, 12, architecture.vocab_size)
    torch.testing.assert_close(models[0](tokens), models[1](tokens))
    for model in models:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


ALIKE = {
    "defaults written out": (
        plain(block(DENSE)),
        plain(block({**DENSE, "activation": "swiglu"}), norm="rmsnorm", tie_embeddings=True),
    ),
    "order of keys": (plain(block(DENSE)), dict(reversed(plain(block(DENSE)).items()))),
    "heads written out": (
        plain(block(DENSE, {"kind": "attention", "head_dim": 8})),
        plain(block(DENSE, {"kind": "attention", "head_dim": 8, "n_heads": 2, "n_kv_heads": 2})),
    ),
    "repeat": (plain(block(DENSE, repeat=2)), plain(block(DENSE), block(DENSE))),
    "runs": (
        plain(block(DENSE, repeat=2), block(DENSE), moe()),
        plain(block(DENSE), block(DENSE, repeat=2), moe()),
    ),
    "preset": (
        plain(moe(router={"preset": "mixtral"})),
        plain(
            moe(
                router={
                    "top_k": 2,
                    "normalize": True,
                    "balance": {"kind": "aux_loss", "coef": 0.02},
                    "loss_reduce": "pooled",
                }
            )
        ),
    ),
    "shared experts": (
        plain(moe(n_shared_experts=2, d_shared=8)),
        plain(moe(n_shared_experts=1, d_shared=16)),
    ),
    "room for all": (
        plain(moe(router={"top_k": 2, "capacity_factor": 2.0})),
        plain(moe(router={"top_k": 2})),
    ),
    "number types": (plain(block(DENSE)), plain(block({**DENSE, "d_ff": 24.0}))),
}


@pytest.mark.parametrize("name", ALIKE)
def test_spellings_of_one_architecture_share_a_fingerprint(name: str) -> None:
    one, other = (Architecture.parse(spelling) for spelling in ALIKE[name])
    assert one.fingerprint == other.fingerprint
    tokens = some_tokens()
    assert torch.equal(one.build(seed=0)(tokens), other.build(seed=0)(tokens))


def test_different_architectures_have_different_fingerprints() -> None:
    spellings = [
        plain(block(DENSE)),
        plain(block(DENSE), norm="layernorm"),
        plain(block(DENSE), tie_embeddings=False),
        plain(block(DENSE), vocab_size=31),
        plain(block(DENSE, repeat=2)),
        plain(block({**DENSE, "activation": "geglu"})),
        plain(block(DENSE, {**ATTENTION, "n_kv_heads": 2})),
        plain(block(DENSE, {**ATTENTION, "rope": {"theta": 500.0}})),
        plain(block(DENSE), moe()),
        plain(moe(), block(DENSE)),
        plain(moe()),
        plain(moe(router={"top_k": 2, "normalize": False})),
        plain(moe(router={"top_k": 2, "balance": {"kind": "aux_loss", "coef": 0.1}})),
        plain(moe(router={"top_k": 2, "capacity_factor": 1.0})),
        plain(moe(n_shared_experts=1)),
    ]
    fingerprints = {Architecture.parse(spelling).fingerprint for spelling in spellings}
    assert len(fingerprints) == len(spellings)
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in fingerprints)


def test_a_part_that_does_not_fit_is_named_with_its_place() -> None:
    with pytest.raises(SpaceError, match=r"blocks\.1\.mixer: head_dim \(24\) must divide d_model"):
        parse(block(DENSE), block(DENSE, {"kind": "attention", "head_dim": 24}))
    with pytest.raises(SpaceError, match=r"top_k \(8\) must be at most n_experts \(4\)"):
        parse(moe(router={"top_k": 8}))
    with pytest.raises(SpaceError, match="multiple of 8"):
        parse(block(DENSE), d_model=20)


def test_names_hold_the_fields_of_each_layer() -> None:
    dense, mixture = parse(block(DENSE), moe()).names()
    assert dense["d_ff"] == 24
    assert (dense["mixer"], dense["ffn"]) == ("attention", "dense")
    assert (dense["n_layers"], dense["d_model"], dense["n_heads"]) == (2, 16, 2)
    assert "n_experts" not in dense
    assert (mixture["ffn"], mixture["n_experts"], mixture["top_k"]) == ("moe", 4, 2)
    assert "capacity_factor" not in mixture
    assert mixture["normalize"] == 1.0


def test_the_description_is_one_line_with_every_group() -> None:
    text = parse(block(DENSE, repeat=2), moe()).describe()
    assert "\n" not in text
    assert "dense 24" in text
    assert "4e top2" in text


def test_modules_are_found_on_the_device_that_was_asked_for() -> None:
    model = EVERYTHING.build("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert isinstance(model, nn.Module)


def test_a_model_can_train_after_it_was_used_for_inference() -> None:
    blocks = [{"mixer": {"kind": "attention", "head_dim": 8}, "ffn": {"kind": "dense", "d_ff": 16}}]
    model = Architecture.parse({"vocab_size": 16, "d_model": 16, "blocks": blocks}).build()
    tokens = torch.arange(8).view(1, 8)
    with torch.inference_mode():
        model.loss(tokens, tokens)
    model.loss(tokens, tokens).backward()
    assert model.embedding.grad is not None


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_teaches_every_router(top_k: int) -> None:
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 16}
    ffn["router"] = {"top_k": top_k, "balance": "none"}
    blocks = [{"mixer": {"kind": "attention", "head_dim": 8}, "ffn": ffn}]
    model = Architecture.parse({"vocab_size": 16, "d_model": 16, "blocks": blocks}).build()
    tokens = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens).backward()
    ((_, moe),) = model.moe_layers()
    assert moe.router.logits.weight.grad is not None
    assert moe.router.logits.weight.grad.norm() > 1e-4
