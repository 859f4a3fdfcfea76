"""The language of mask expressions: it means what Python means, and nothing else is let in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_inductor.kernels import mask as masks
from s2o_inductor.kernels.mask_language import integer, term
from s2o_inductor.mask_spec import MaskSpec, parse

CPU = torch.device("cpu")
NAMES = {
    "b": torch.arange(2)[:, None, None, None],
    "q": torch.arange(5)[:, None],
    "k": torch.arange(7),
}
LEAF = torch.tensor([[3, -1, 4, 1, -5, 9, 2], [6, 5, -3, 5, 8, 9, 7]])
PARAMS = [3, -4]
Written = tuple[str, Any]  # text in the language, and a function (b, q, k) -> value in Python


def integers() -> st.SearchStrategy[Written]:
    atoms: list[Written] = [
        ("b", lambda b, q, k: b),
        ("q", lambda b, q, k: q),
        ("k", lambda b, q, k: k),
        ("p0", lambda b, q, k: PARAMS[0]),
        ("p1", lambda b, q, k: PARAMS[1]),
        ("L0[b, k]", lambda b, q, k: int(LEAF[b, k])),
        ("L0[0, min(q, k)]", lambda b, q, k: int(LEAF[0, min(q, k)])),
    ]
    literals = st.integers(0, 9).map(lambda n: (str(n), lambda b, q, k: n))

    def extend(inner: st.SearchStrategy[Written]) -> st.SearchStrategy[Written]:
        def binary(left: Written, symbol: str, right: Written) -> Written:
            python = {
                "+": lambda x, y: x + y,
                "-": lambda x, y: x - y,
                "*": lambda x, y: x * y,
                "min": min,
                "max": max,
            }[symbol]
            text = (
                f"{symbol}({left[0]}, {right[0]})" if symbol in ("min", "max") else f"({left[0]} {symbol} {right[0]})"
            )
            return text, lambda b, q, k: python(left[1](b, q, k), right[1](b, q, k))

        def divide(left: Written, symbol: str, by: int) -> Written:
            def python(b: int, q: int, k: int) -> int:
                return left[1](b, q, k) // by if symbol == "//" else left[1](b, q, k) % by

            return f"({left[0]} {symbol} {by})", python

        unary = st.tuples(inner, st.sampled_from(["-", "abs"])).map(
            lambda x: (
                f"{x[1]}({x[0][0]})",
                lambda b, q, k: -x[0][1](b, q, k) if x[1] == "-" else abs(x[0][1](b, q, k)),
            )
        )
        return st.one_of(
            st.builds(binary, inner, st.sampled_from(["+", "-", "*", "min", "max"]), inner),
            st.builds(divide, inner, st.sampled_from(["//", "%"]), st.sampled_from([-3, -1, 1, 2, 5])),
            unary,
        )

    return st.recursive(st.sampled_from(atoms) | literals, extend, max_leaves=6)


def booleans() -> st.SearchStrategy[Written]:
    comparisons: dict[str, Any] = {
        "<": lambda x, y: x < y, "<=": lambda x, y: x <= y, ">": lambda x, y: x > y, ">=": lambda x, y: x >= y,
        "==": lambda x, y: x == y, "!=": lambda x, y: x != y,
    }  # fmt: skip

    def compare(left: Written, symbol: str, right: Written) -> Written:
        python = comparisons[symbol]
        return f"({left[0]} {symbol} {right[0]})", lambda b, q, k: python(left[1](b, q, k), right[1](b, q, k))

    def join(left: Written, symbol: str, right: Written) -> Written:
        def python(b: int, q: int, k: int) -> bool:
            x, y = left[1](b, q, k), right[1](b, q, k)
            return (x and y) if symbol == "&" else (x or y)

        return f"({left[0]} {symbol} {right[0]})", python

    base = st.builds(compare, integers(), st.sampled_from(list(comparisons)), integers())
    return st.recursive(
        base,
        lambda inner: st.one_of(
            st.builds(join, inner, st.sampled_from("&|"), inner),
            inner.map(lambda x: (f"~{x[0]}", lambda b, q, k: not x[1](b, q, k))),
        ),
        max_leaves=3,
    )


@given(st.one_of(integers(), booleans()), st.booleans())
def test_language_means_what_python_means(written: Written, boolean: bool) -> None:
    text, python = written
    got = term(text, NAMES, [LEAF], PARAMS, boolean).expand(2, 1, 5, 7)
    for b in range(2):
        for q in range(5):
            for k in range(7):
                wanted = python(b, q, k)
                assert got[b, 0, q, k].item() == (bool(wanted) if boolean else int(wanted)), (text, b, q, k)


def test_language_counts_booleans_as_integers() -> None:
    leaf = torch.tensor([[True, False, True, True, False, True, True]]).expand(2, 7)
    assert term("L0[b, k] + L0[b, k]", NAMES, [leaf], [], False)[1, 0, 0].tolist() == [2, 0, 2, 2, 0, 2, 2]
    assert (
        term("~L0[b, k]", NAMES, [leaf], [], True)[1, 0, 0].tolist() == [False, True, False, False, True] + [False] * 2
    )
    assert term("L0", {"b": NAMES["b"]}, [torch.tensor(7)], [], False).item() == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("q +", "not a mask expression"),
        ("__import__('os')", "not in the language"),
        ("exec(q)", "no function exec of 1 arguments"),
        ("q.__class__", "not in the language"),
        ("(lambda: 1)()", "not in the language"),
        ("[1][0]", "not in the language"),
        ("1.5", "not in the language"),
        ("q / 2", "not in the language"),
        ("q ** 2", "not in the language"),
        ("q and k", "not in the language"),
        ("min(q)", "no function min of 1 arguments"),
        ("abs(x=q)", "not in the language"),
        ("h", "unknown name 'h'"),
        ("p7", "p7 needs 8 parameters"),
        ("L5[b, k]", "not one of the 1 leaves"),
        ("q[b, k]", "not one of the 1 leaves"),
        ("L0[k]", "has shape"),
        ("L0", "has shape"),
        ("L0[b, k + 1]", "out of range for size 7"),
        ("L0[b - 1, k]", "out of range for size 2"),
        ("L0[2, k]", "index 2 of L0 is out of range"),
    ],
)
def test_language_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="mask expression") as error:
        term(text, NAMES, [LEAF], PARAMS, False)
    assert reason in str(error.value)


def test_terms_see_only_the_names_of_their_side() -> None:
    for spec in (
        MaskSpec(keys="q < 3"),
        MaskSpec(rows="k < 3"),
        MaskSpec(equal=("k", "k")),
        MaskSpec(at_most=("q", "q")),
    ):
        for run in (masks.evaluate, lambda *a: masks.plan(*a[1:4], a[0], *a[4:])):
            with pytest.raises(ValueError, match="unknown name"):
                run(spec, None, [], [], 1, 4, 4, CPU)
    with pytest.raises(ValueError, match="unknown name"):
        integer("q", [])
    with pytest.raises(ValueError, match="not one of the 0 leaves"):
        integer("L0[0]", [])


def test_integer_terms_refuse_fractions() -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        term("L0[b, k]", NAMES, [LEAF.double()], [], False)
    assert term("L0[b, k] > 0", NAMES, [LEAF.double()], [], True).dtype == torch.bool


def test_leaves_are_read_inside_their_bounds_on_devices() -> None:
    """A GPU's indices cannot be tested without waiting for it, so they are clamped: here on meta tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func._overloadpacket.__name__, args[1:]))
            return func(*args, **(kwargs or {}))

    names = {name: x.to("meta") for name, x in NAMES.items()}
    with Watch():
        term("L0[b, k + 100]", names, [LEAF.to("meta")], [], False)
    assert [args for name, args in calls if name == "clamp"] == [(0, 1), (0, 6)]


def test_spec_survives_its_text() -> None:
    spec = MaskSpec(
        lower="p0 - 3", upper="0", keys="L0[b, k]", equal=("L1[b, q]", "L1[b, k]"), dense=True, empty="mean"
    )
    assert parse(spec.text()) == spec
    assert MaskSpec().text() == "{}"
    with pytest.raises(ValueError, match="not a mask spec"):
        parse('{"upper": 0')
