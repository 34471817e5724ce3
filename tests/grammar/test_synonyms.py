"""The table of synonyms: each entry names a word of today's grammar, and errors use it."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from moenas.errors import SpaceError
from moenas.grammar.component import Component, fields
from moenas.grammar.synonyms import SYNONYMS, hint
from moenas.model.architecture import Architecture
from moenas.space.space import Space

SPACE = """
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - mixer: {kind: attention, head_dim: 16}
      ffn:
        kind: moe
        n_experts: 4
        d_expert: 32
        router: {top_k: 2}
objectives: [active_params]
"""


def words(cls: type[Component], seen: set[type]) -> set[str]:
    """Every field, kind and value below a component."""
    if cls in seen:
        return set()
    seen.add(cls)
    names = set(cls.kinds)
    for member in [cls, *cls.kinds.values()]:
        for name, field in fields(member).items():
            names |= {name, *map(str, field.choices)}
            if field.component is not None:
                names |= words(field.component, seen)
    return names


def pairs(cls: type[Component], seen: set[type]) -> set[tuple[str, str]]:
    """Every field of a component with the fields of what stands in it."""
    if cls in seen:
        return set()
    seen.add(cls)
    known = set()
    for member in [cls, *cls.kinds.values()]:
        for name, field in fields(member).items():
            if field.component is not None:
                inner = [field.component, *field.component.kinds.values()]
                known |= {(name, below) for kind in inner for below in fields(kind)}
                known |= pairs(field.component, seen)
    return known


def test_the_paths_of_synonyms_exist() -> None:
    known = pairs(Architecture, set())
    for target in SYNONYMS.values():
        path = target.partition(" with ")[0].split(".")
        assert set(pairwise(path)) <= known, target


def test_every_synonym_leads_to_words_of_the_grammar() -> None:
    known = words(Architecture, set())
    for word, target in SYNONYMS.items():
        assert set(re.findall(r"[a-z_]\w*", target.replace(" with ", "."))) <= known, word


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: attention", "kind: mla", "Did you mean 'latent_attention'?"),
        ("kind: attention", "kind: MLA", "Did you mean 'latent_attention'?"),
        ("kind: attention", "kind: gqa", "Did you mean 'attention' with n_kv_heads?"),
        ("kind: moe", "kind: swiglu", "Did you mean 'dense' with activation: swiglu?"),
        ("d_model: 64", "hidden_size: 64", "Did you mean 'd_model'?"),
        ("d_model: 64", "num_hidden_layers: 2", "Did you mean 'blocks.repeat'?"),
        ("n_experts: 4", "num_experts: 4", "Did you mean 'n_experts'?"),
        ("n_experts: 4", "num_experts_per_tok: 4", "Did you mean 'router.top_k'?"),
        ("top_k: 2", "norm_topk_prob: true", "normalize'"),
        ("head_dim: 16", "num_key_value_heads: 2", "Did you mean 'n_kv_heads'?"),
        ("head_dim: 16", "mscale: 2", "attention_factor'"),
        ("d_expert: 32", "moe_intermediate_size: 32", "Did you mean 'd_expert'?"),
        ("top_k: 2", "num_experts: 2", "A space file writes it as 'ffn.n_experts'."),
        ("top_k: 2", "preset: ernie", "It is in 'zoo/ernie_4_5_21b_a3b': see docs/zoo.md."),
        ("objectives", "require: [num_experts > 2]\nobjectives", "Did you mean 'n_experts'?"),
    ],
)
def test_an_error_names_the_word_of_a_space_file(old: str, new: str, said: str) -> None:
    with pytest.raises(SpaceError) as refused:
        Space.parse(SPACE.replace(old, new, 1), "s.yaml")
    assert said in str(refused.value)


def test_a_word_without_a_synonym_gets_the_nearest_spelling() -> None:
    assert hint("radis", ["radius", "angle"]) == " Did you mean 'radius'?"
    assert hint("zzz", ["radius", "angle"]) == ""
