"""The closed grammar of requirements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.requirements import parse_requirement

KNOWN = {"a", "b", "c", "norm", "top_k", "n_experts", "m.q", "f.r.q", "q"}
MARK = SourceLocation("f", 3, 10)


def violation(text: str, *layers: dict[str, float | str | None]) -> float:
    return parse_requirement(text, MARK, KNOWN).violation(list(layers))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a < 3", True),
        ("a < 2", False),
        ("a <= 2", True),
        ("a > 2", False),
        ("a >= 2", True),
        ("a == 2", True),
        ("a != 2", False),
        ("1 < a < 3", True),
        ("2 < a < 3", False),
        ("a * b + 1 == 11", True),
        ("b // a == 2 and b % a == 1", True),
        ("a == 5 or b == 5", True),
        ("not a == 2", False),
        ("not a == 3", True),
        ("min(a, b) == 2 and max(a, b) == 5 and abs(-a) == 2", True),
        ("norm == 'rmsnorm'", True),
        ("norm != 'rmsnorm'", False),
        ("a < 2e6", True),
        ("a / 0 < 1", False),
        (f"a / 3 < {'*'.join(['9' * 30] * 11)}", True),
    ],
)
def test_expressions_mean_what_python_means(text: str, holds: bool) -> None:
    names = {"a": 2.0, "b": 5.0, "norm": "rmsnorm"}
    assert (violation(text, names) <= 0) is holds


comparisons = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.integers(-3, 3)
).map(lambda t: f"{t[0]} {t[1]} {t[2]}")
logic = st.recursive(
    comparisons,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        )
        | inner.map(lambda t: f"(not {t})")
    ),
    max_leaves=6,
)


@given(logic, st.integers(-3, 3), st.integers(-3, 3))
def test_random_logic_agrees_with_python(text: str, a: int, b: int) -> None:
    expected = eval(text, {}, {"a": a, "b": b})
    assert (violation(text, {"a": a, "b": b}) <= 0) is expected


def test_the_worst_layer_counts_and_layers_without_the_names_do_not() -> None:
    layers = [{"top_k": 2, "n_experts": 4}, {"d_ff": 64}, {"top_k": 6, "n_experts": 4}]
    assert violation("top_k <= n_experts", *layers) == pytest.approx(1 / 3)
    assert violation("top_k <= n_experts", {"d_ff": 64}) == 0
    assert violation("top_k <= n_experts", {"top_k": None, "n_experts": 4}) == 0


def test_a_name_may_say_of_which_part_it_is() -> None:
    assert violation("m.q * 2 <= f.r.q", {"m.q": 2.0, "f.r.q": 4.0}) == 0
    assert violation("m.q * 2 < f.r.q", {"m.q": 3.0, "f.r.q": 4.0}) == pytest.approx(1 / 3)
    assert violation("f.r.q < 1", {"m.q": 3.0}) == 0


def test_a_wider_break_is_a_larger_violation() -> None:
    near, far = violation("a < 10", {"a": 11}), violation("a < 10", {"a": 30})
    assert 0 < near < far


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("a <", 10, "not valid"),
        ("a", 10, "not a comparison"),
        ("aa < 3", 10, "Did you mean 'a'?"),
        ("a < d", 14, "no cost or field 'd'"),
        ("__import__('os').system('x') < 1", 10, "not allowed"),
        ("a.b < 1", 10, "no cost or field 'a.b'"),
        ("a().b < 1", 10, "not allowed"),
        ("(a + b).real < 1", 10, "not allowed"),
        ("c < 1 and top_k + q < 3", 28, "'q' is a field of several parts; write m.q or f.r.q"),
        ("[a] < 1", 10, "not allowed"),
        ("a in b", 10, "compare with"),
        ("a ** 9999999 < 1", 10, "not allowed"),
        ("(lambda: 1)() < 1", 10, "not allowed"),
        ("norm < 'x'", 10, "words compare"),
        ("abs(a, b) < 1", 10, "not allowed"),
        ("min(a) < 1", 10, "not allowed"),
        ("a < " + "9" * 60, 14, "numbers go up to"),
        ("a / 3 < 1e400", 18, "numbers go up to"),
        ("a < 1" + " and a < 1" * 100, 10, "longer than"),
        ("(" * 240 + "a < 1" + ")" * 240, 10, "require"),
    ],
)
def test_anything_else_is_refused_at_its_column(text: str, column: int, words: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse_requirement(text, MARK, KNOWN, {"q": ["m.q", "f.r.q"]})
    message = str(error.value)
    assert words in message
    assert message.startswith("f:3:")
    if len(text) < 100:
        assert message.startswith(f"f:3:{column}:")
