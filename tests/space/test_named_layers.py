"""Named layers: a spelling that no fingerprint sees, with one hole for all uses."""

from __future__ import annotations

import textwrap

import jsonschema
import pytest

from moenas import resources
from moenas.errors import SpaceError
from moenas.grammar.enumeration import enumerate_points
from moenas.grammar.sampling import RandomSuggest
from moenas.model.architecture import Architecture
from moenas.space.space import Space, file_schema

HEAD = "objectives: [active_params]\n"
LAYERS = """\
layers:
  local: {mixer: {kind: attention, head_dim: 16, window: 32}}
  heads: {kind: attention, head_dim: 16, n_heads: 4}
  experts:
    ffn: {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: 2}}
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - {layer: local, repeat: 2}
    - experts
    - repeat: 2
      blocks: [local, experts]
    - {mixer: heads, ffn: {kind: dense, d_ff: 64}}
    - {mixer: {layer: heads, n_heads: 2}}
"""
WRITTEN_OUT = """\
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 16, window: 32}
    - ffn: {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: 2}}
    - repeat: 2
      blocks:
        - mixer: {kind: attention, head_dim: 16, window: 32}
        - ffn: {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: 2}}
    - mixer: {kind: attention, head_dim: 16, n_heads: 4}
      ffn: {kind: dense, d_ff: 64}
    - mixer: {kind: attention, head_dim: 16, n_heads: 2}
"""


def parse(text: str) -> Space:
    return Space.parse(HEAD + text, "s.yaml")


def drawn(space: Space, seed: int = 0) -> Architecture:
    return space.architecture(space.draw(RandomSuggest(seed)))


def sampled(space: Space) -> Architecture:
    """The architecture as it is written, not in canonical form."""
    return Architecture.parse(space.draw(RandomSuggest(0)))


def test_a_named_layer_is_a_spelling_alone() -> None:
    named, written = parse(LAYERS), parse(WRITTEN_OUT)
    assert named.plain() == written.plain()
    assert drawn(named).fingerprint == drawn(written).fingerprint
    assert drawn(named).cost(128) == drawn(written).cost(128)


HOLES = """\
layers:
  attn: {mixer: {kind: attention, head_dim: {choice: [16, 32]}}}
  net:
    ffn:
      choice:
        - {kind: dense, d_ff: {int: [32, 64], step: 16}}
        - {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: {choice: [1, 2]}}}
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - attn
    - net
    - choice: [attn, {mixer: {kind: attention, head_dim: {choice: [8, 16]}}}]
    - {repeat: 2, vary: true, blocks: [net]}
"""


def test_a_hole_of_a_named_layer_is_one_hole_in_all_uses() -> None:
    space = parse(HOLES)
    names = [hole.name for hole in space.holes]
    assert names.count("layers.attn.mixer.head_dim") == 1
    assert {name for name in names if name.startswith("layers.net")} == {
        "layers.net.ffn",
        "layers.net.ffn.dense.d_ff",
        "layers.net.ffn.moe.router.top_k",
    }
    for seed in range(20):
        blocks = space.draw(RandomSuggest(seed))["blocks"]
        nets = [blocks[1]["ffn"]] + [group["blocks"][0]["ffn"] for group in blocks[3:]]
        assert all(net == nets[0] for net in nets)


def test_the_count_of_points_is_that_of_their_enumeration() -> None:
    """(2 sizes of head) x (3 + 2 nets) x (the layer again, or one of 2 others)."""
    space = parse(HOLES)
    points = list(enumerate_points(space.tree))
    assert space.size == len(points) == 2 * 5 * 3
    assert len({repr(sorted(p.items())) for p in points}) == len(points)


NESTED = """\
layers:
  small: {kind: dense, d_ff: {choice: [32, 64, 96]}}
  block:
    mixer: {kind: attention, head_dim: {choice: [16, 32]}}
    ffn: {choice: [small, {kind: dense, d_ff: 128}]}
architecture:
  vocab_size: 256
  d_model: 64
  blocks: [block, {ffn: small}, {repeat: {choice: [1, 2]}, layer: block}]
"""


def test_a_named_layer_may_use_another() -> None:
    space = parse(NESTED)
    # Head size, width of `small` (always used), which ffn `block` has, and the number of repeats.
    assert space.size == len(list(enumerate_points(space.tree))) == 2 * 3 * 2 * 2
    assert "layers.block.ffn" in {hole.name for hole in space.holes}
    labels = {h.name: h.tree.labels for h in space.holes if hasattr(h.tree, "labels")}
    assert labels["layers.block.ffn"] == ("small", "dense")


def test_two_spaces_that_share_other_holes_have_other_digests() -> None:
    one = parse(HOLES)
    unshared = HOLES.replace("    - net\n", "    - " + NET).replace("[net]", "[" + FLOW + "]")
    other = parse(unshared.replace(UNUSED, ""))
    assert other.plain()["architecture"] == one.plain()["architecture"]
    assert other.sha256 != one.sha256


FLOW = (
    "{ffn: {choice: [{kind: dense, d_ff: {int: [32, 64], step: 16}},"
    " {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: {choice: [1, 2]}}}]}}"
)
NET = FLOW + "\n"
UNUSED = HOLES[HOLES.index("  net:\n") : HOLES.index("architecture:")]


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("- experts", "- expert", "12:7: architecture.blocks.1", "Did you mean 'experts'?"),
        ("layer: local", "layer: locale", "11:15: architecture.blocks.0.layer", "Did you mean 'local'?"),
        ("mixer: heads", "mixer: head", "15:15: architecture.blocks.3.mixer", "Did you mean 'heads'?"),
        ("  heads:", "  unused: {kind: dense, d_ff: 64}\n  heads:", "4:3: layers.unused", "no block uses this layer"),
        ("  heads:", "  moe: {kind: dense, d_ff: 64}\n  heads:", "4:3: layers.moe", "a kind has this name"),
        ("  heads:", "  a-b: {kind: dense, d_ff: 64}\n  heads:", "4:3: layers.a-b", "letters, digits and _"),
        ("  heads:", "  many: 3\n  heads:", "4:9: layers.many", "3 is not a block or a component"),
        ("n_heads: 4}", "n_heads: 4, n_kv_heads: 3}", "4:10: layers.heads", "must divide"),
        ("n_heads: 4}", "n_head: 4}", "4:42: layers.heads.n_head", "Did you mean 'n_heads'?"),
        ("{top_k: 2}", "{top_k: 9}", "6:10: layers.experts.ffn", "top_k (9)"),
        ("  experts:\n    ffn: {", "  experts:\n    blocks: [experts]\n    ffn: {", "6:14: layers.experts.blocks.0", "inside itself"),
    ],
)  # fmt: skip
def test_a_wrong_layer_is_refused_at_its_place(old: str, new: str, place: str, said: str) -> None:
    with pytest.raises(SpaceError) as refused:
        parse(LAYERS.replace(old, new, 1))
    assert f"s.yaml:{place}: " in str(refused.value)
    assert said in str(refused.value)


def test_the_schema_knows_named_layers() -> None:
    for text in (LAYERS, HOLES, NESTED, WRITTEN_OUT):
        jsonschema.validate(resources.parse_yaml(HEAD + text, "s.yaml").plain, file_schema())
    wrong = resources.parse_yaml(HEAD + LAYERS.replace("layer: local", "lier: local"), "s").plain
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, file_schema())


def test_an_override_reaches_a_named_layer() -> None:
    space = Space.parse(HEAD + LAYERS, "s.yaml", ["layers.local.mixer.window=48"])
    layers = sampled(space).layers
    windows = [getattr(layer.mixer, "window", None) for layer in layers]
    assert windows == [48, 48, None, 48, None, 48, None, None, None]


def test_an_override_below_a_name_changes_this_use_alone() -> None:
    text = """
layers:
  local: {kind: attention, head_dim: 16, window: 64}
  experts: {kind: moe, n_experts: 4, d_expert: 16, router: {preset: mixtral, balance: bias}}
architecture:
  vocab_size: 256
  d_model: 32
  blocks: [{mixer: local, ffn: experts}, {mixer: local, ffn: experts}]
objectives: [active_params]
"""
    lines = ["mixer.window=32", "ffn.router.top_k=3", "ffn.router.balance.rate=0.5"]
    space = Space.parse(text, "s.yaml", [f"architecture.blocks.0.{line}" for line in lines])
    one, other = space.draw(RandomSuggest(0))["blocks"]
    assert (one["mixer"]["window"], other["mixer"]["window"]) == (32, 64)
    assert (one["ffn"]["router"]["top_k"], other["ffn"]["router"]["top_k"]) == (3, 2)
    assert one["ffn"]["router"]["balance"] == {"kind": "bias", "rate": 0.5}
    assert one["ffn"]["router"]["loss_reduce"] == "pooled"


def test_an_override_of_a_layer_that_uses_itself_is_an_error() -> None:
    text = """
        architecture:
          vocab_size: 256
          d_model: 64
          blocks: [{mixer: {kind: attention, head_dim: 16}, ffn: a}]
        layers:
          a: {layer: a}
        objectives: [val_loss]
        data: stdlib
    """
    with pytest.raises(SpaceError, match="the layer 'a' is inside itself"):
        Space.parse(textwrap.dedent(text), "x.yaml", ["architecture.blocks.0.ffn.d_ff=64"])


def test_an_override_fills_an_empty_section() -> None:
    text = Space.load("tiny").text
    emptied = text.replace("search: {sampler: tpe, trials: 20, seed: 0}", "search:")
    assert Space.parse(emptied, "x.yaml", ["search.trials=3"]).search.trials == 3
