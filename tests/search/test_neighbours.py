"""Feasible points, at random and one mutation away."""

from __future__ import annotations

from moenas.search.neighbours import held_point, neighbour, point
from moenas.space.space import Space


def test_a_point_has_the_parameters_that_give_its_architecture() -> None:
    space = Space.load("tiny")
    points = [p for seed in range(40) if (p := point(space, seed)) is not None]
    assert len({p.architecture.fingerprint for p in points}) > 30
    for one in points:
        again = point(space, 999, one.params)
        assert again is not None
        assert again.architecture == one.architecture
        assert again.params == one.params


def test_an_infeasible_point_is_none() -> None:
    space = Space.load("tiny", ["require=[active_params < 300_000]"])
    points = [point(space, seed) for seed in range(60)]
    assert None in points
    assert all(p is None or space.cost(p.architecture).active_params < 300_000 for p in points)


def test_a_neighbour_differs_in_one_hole_and_what_depends_on_it() -> None:
    space = Space.load("tiny")
    parent = next(p for seed in range(9) if (p := point(space, seed)) is not None)
    changed = set()
    for seed in range(60):
        moved = neighbour(space, parent.params, seed)
        assert moved is not None
        shared = parent.params.keys() & moved.params.keys()
        (name,) = [n for n in shared if parent.params[n] != moved.params[n]]
        changed.add(name)
        # A hole that exists in one of the two alone stands under the one that changed.
        for other in parent.params.keys() ^ moved.params.keys():
            assert other.startswith(name)
    assert changed == set(parent.params)


def test_stored_parameters_give_their_point_and_parts_of_them_none() -> None:
    space = Space.load("tiny")
    drawn = next(p for seed in range(9) if (p := point(space, seed)) is not None)
    held = held_point(space, drawn.params)
    assert held is not None
    assert held.architecture == drawn.architecture
    for name in drawn.params:
        others = {key: value for key, value in drawn.params.items() if key != name}
        assert held_point(space, others) is None
