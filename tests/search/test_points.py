"""Points that a study has drawn are known by the holes that have an effect."""

from __future__ import annotations

from moenas.search.neighbours import held_point, neighbour
from moenas.search.points import Points
from moenas.space.space import Space

SPACE = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - ffn:
        kind: moe
        n_experts: 4
        d_expert: 8
        n_shared_experts: {choice: [0, 1]}
        d_shared: {choice: [8, 16]}
objectives: [total_params]
"""
HELD = "blocks.0.ffn.n_shared_experts"
DEAD = "blocks.0.ffn.d_shared"


def test_parameters_of_holes_without_effect_do_not_make_another_point() -> None:
    space = Space.parse(SPACE)
    assert space.size == 3
    points = Points(space)
    # As a study of an earlier version holds them.
    points.add({HELD: 0, DEAD: 8})
    points.add({HELD: 0, DEAD: 16})
    points.add({HELD: 1, DEAD: 8})
    assert not points.exhausted
    assert points.unseen() == {HELD: 1, DEAD: 16}
    points.add({HELD: 1, DEAD: 16})
    assert points.exhausted
    assert points.unseen() is None


def test_a_stored_parameter_without_effect_is_no_neighbour() -> None:
    space = Space.parse(SPACE)
    held = held_point(space, {HELD: 0, DEAD: 16})
    assert held is not None
    assert held.params == {HELD: 0}
    for seed in range(10):
        moved = neighbour(space, {HELD: 0, DEAD: 16}, seed)
        assert moved is None or moved.params[HELD] == 1
