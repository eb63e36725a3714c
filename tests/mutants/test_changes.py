"""Every kind of change is made where it applies, and excluded parts of the code stay unchanged."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.__main__ import explained
from tests.mutants.changes import mutants
from tests.mutants.table import TABLE

COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "**": "*", "&": "|", "|": "&"}
OPPOSITES = {"min": "max", "any": "all", "floor": "ceil", "minimum": "maximum", "argmin": "argmax"}


def changes(statement: str) -> list[str]:
    """Return `before -> after` of all mutants of one statement in a function of a, b, c and d."""
    lines = "".join(f"        {line}\n" for line in statement.splitlines())
    return of_module(f"def f(a, b, c, d):\n    for x in a:\n{lines}")


def of_module(source: str) -> list[str]:
    return [f"{one.before} -> {one.after}" for one in mutants("core/tiny.py", source)]


@pytest.mark.parametrize(
    "statement",
    ["a.push(b)", "a.b = c", "a[b] = c", "a.b: int = c", "b = x", "b, c = x", "break", "continue", "del a"],
)
def test_a_statement_that_binds_no_new_name_is_deleted(statement: str) -> None:
    assert changes(statement) == [f"{statement} -> pass"]


@pytest.mark.parametrize("statement", ["only = b", "only, b = c", "only: int = b", "return b"])
def test_the_only_assignment_of_a_name_is_not_deleted(statement: str) -> None:
    assert changes(statement) == []


def test_a_constant_of_the_module_is_changed_and_not_deleted() -> None:
    assert of_module("LIMIT = 3\nLIMIT = 4\n") == ["3 -> 4", "4 -> 5"]


def test_expressions_inside_a_change_are_changed_too() -> None:
    assert changes("only: int = -b") == ["-b -> b"]
    assert set(changes("return -a and b")) == {"-a and b -> -a or b", "-a -> a"}
    assert set(changes("a += -b")) == {"a += -b -> a -= -b", "a += -b -> pass", "-b -> b"}
    assert set(changes("return g(-a).min.b[-c] == d")) == {
        *("g(-a).min.b[-c] == d -> g(-a).min.b[-c] != d", "g(-a).min.b[-c] -> g(-a).min.b"),
        *("g(-a).min -> g(-a).max", "-a -> a", "-c -> c"),
    }


def test_two_changes_with_equal_text_are_one_mutant() -> None:
    assert changes("return a + a") == ["a + a -> a - a", "a + a -> a"]
    assert changes("return {x for x in a if True}") == ["True -> False"]


def test_a_name_is_bound_only_within_its_function() -> None:
    nested = "def f():\n    a = b\n    def g():\n        a = b\n        a = c\n    return a\n"
    assert of_module(nested) == ["a = b -> pass"] * 2 + ["a = c -> pass"]
    apart = "def f():\n    a = b\n    return a\n\n\ndef g():\n    a = b\n    return a\n"
    assert of_module(apart) == []
    assert of_module("def f():\n    def g(): return\n    a = b\n    return a\n") == []
    assert changes("only = a.b = c") == ["only = a.b = c -> pass"]


def test_a_raise_statement_is_deleted_as_a_whole() -> None:
    assert changes("raise Error(a + 1)") == ["raise Error(a + 1) -> pass"]


def test_an_assertion_is_deleted_and_its_condition_changed() -> None:
    assert changes("assert a == b, a + 1") == ["assert a == b, a + 1 -> pass", "a == b -> a != b"]


@pytest.mark.parametrize(("operator", "others"), COMPARISONS.items())
def test_a_comparison_gets_its_opposite_and_its_bound_moved(operator: str, others: tuple[str, ...]) -> None:
    assert set(changes(f"return a {operator} b")) == {f"a {operator} b -> a {other} b" for other in others}


def test_each_comparison_of_a_chain_is_changed_alone() -> None:
    assert changes("return a < b == c") == [
        "a < b == c -> a >= b == c",
        "a < b == c -> a <= b == c",
        "a < b == c -> a < b != c",
    ]
    found = mutants("core/tiny.py", "a < b == c <= d\n")
    assert [one.kind for one in found if one.kind != "delete"] == [
        *("comparison 1 by GtE", "comparison 1 by LtE", "comparison 2 by NotEq"),
        *("comparison 3 by Gt", "comparison 3 by Lt"),
    ]
    assert [one.after for one in found if one.kind.startswith("comparison 3")] == ["a < b == c > d", "a < b == c < d"]
    assert [one.kind for one in mutants("core/tiny.py", "x = a == b\n")] == ["compare by NotEq"]


@pytest.mark.parametrize(
    ("statement", "test"),
    [("if a.ok:\n    return", "a.ok"), ("while a.ok:\n    return", "a.ok"), ("return b if a.ok else c", "a.ok")],
)
def test_a_condition_is_negated(statement: str, test: str) -> None:
    assert changes(statement) == [f"{test} -> not ({test})"]


@pytest.mark.parametrize(
    ("statement", "only"),
    [
        ("if a is b:\n    return", "a is b -> a is not b"),
        ("if not a:\n    return", "not a -> a"),
        ("while a == b:\n    return", "a == b -> a != b"),
    ],
)
def test_a_condition_is_not_negated_twice(statement: str, only: str) -> None:
    assert changes(statement) == [only]


def test_and_becomes_or_and_or_becomes_and() -> None:
    assert changes("return a and b and c") == ["a and b and c -> a or b or c"]
    assert changes("return a or b") == ["a or b -> a and b"]


@pytest.mark.parametrize(("operator", "other"), OPERATORS.items())
def test_an_operation_loses_a_side_and_changes_its_operator(operator: str, other: str) -> None:
    before = f"a {operator} b"
    assert changes(f"return {before}") == [f"{before} -> a {other} b", f"{before} -> a", f"{before} -> b"]


def test_an_operator_without_a_counterpart_still_loses_its_sides() -> None:
    assert changes("return a @ b") == ["a @ b -> a", "a @ b -> b"]


def test_an_update_in_place_is_deleted_and_reversed() -> None:
    assert changes("a += b") == ["a += b -> a -= b", "a += b -> pass"]


def test_a_sign_is_dropped() -> None:
    assert changes("return -a, not b, ~c") == ["-a -> a", "not b -> b", "~c -> c"]


def test_a_subscript_is_dropped_where_it_is_read() -> None:
    assert changes("return a[b, c:]") == ["a[b, c:] -> a"]


def test_a_filter_is_dropped_and_negated() -> None:
    assert changes("return {x for x in a if x.ok if b == c}") == ["x.ok -> True", "b == c -> b != c", "b == c -> True"]


def test_each_keyword_argument_is_dropped_and_no_other_one() -> None:
    assert changes("return g(a, b=c, *d, **a)") == [
        "g(a, b=c, *d, **a) -> g(a, *d, b=c)",
        "g(a, b=c, *d, **a) -> g(a, *d, **a)",
    ]


def test_a_method_call_is_dropped_and_a_module_function_is_not() -> None:
    assert changes("return a.b.sum()") == ["a.b.sum() -> a.b"]
    assert of_module("import time\nnow = time.time()\nthen = clock.time()\n") == ["clock.time() -> clock"]
    assert of_module("import a.b as c\nfrom d import e\nx = c.f(), e.f(), a.f()\n") == ["a.f() -> a"]


@pytest.mark.parametrize(("one", "other"), [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())])
def test_a_function_that_chooses_gets_its_opposite(one: str, other: str) -> None:
    assert changes(f"return {one}(a), b.{one}(c)") == [f"{one} -> {other}", f"b.{one} -> b.{other}"]


def test_a_number_becomes_another_one_and_a_flag_its_opposite() -> None:
    assert changes("return 0, 0.5, True, False") == ["0 -> 1", "0.5 -> 1.5", "True -> False", "False -> True"]
    assert changes("return 1e300, 1e15") == ["1e300 -> 2e+300", "1e15 -> 1000000000000001.0"]


def test_a_default_is_changed() -> None:
    assert of_module("def f(a=1, *, b=True, c): return\n") == ["1 -> 2", "True -> False"]


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring of 1."""\n',
        'def f():\n    """A docstring of 1."""\n',
        "def f(): ...\n",
        "import a.b\nfrom c import d\n",
        "def f(a: x[1] | None, *b: y[2]) -> z[3]: return\n",
        "class A(b[1]):\n    c: d[2]\n    e: f[3] = g\n",
        "class A(Protocol):\n    a = 1\n    def f(self, b=2): return -b\n",
        "@cache(1, key=2)\ndef f(): return\n",
        "if TYPE_CHECKING:\n    a = 1\n",
        "Pairs = tuple[int, dict[str, list[x]]]\nRule = Callable[[int, str], Sequence[x]]\n",
        'def f(a):\n    print(a + 1)\n    a.log.warning("%d", 2)\n    warnings.warn("x", stacklevel=2)\n',
        'def f(a, b): return f"{a + 1} of {b[2]}", "x" + a, a + "x", f"{a}" + b, b + f"{a}", "x" % a\n',
        'def f(a):\n    b = cast(x[1], a)\n    return TypeVar("T", bound=b), getLogger()\n',
        "def f(a): return 'text', None, a.b, g(a)\n",
    ],
)
def test_changes_without_any_effect_are_not_made(source: str) -> None:
    assert of_module(source) == []


def test_a_mutant_says_where_it_is_and_what_it_replaces() -> None:
    source = "class A:\n    def f(self, ä):\n        return ä, ä + (  # why\n            b\n        )  # what\n"
    [one] = [one for one in mutants("core/tiny.py", source) if one.after == "ä - b"]
    assert one.name == "core/tiny.py:3:20+15:compute by Sub"  # columns of a syntax tree count bytes
    assert one.key == "core/tiny.py | A.f | return ä, ä + (  # why | ä + ( # why b ) -> ä - b"
    assert one.source == "class A:\n    def f(self, ä):\n        return ä, (ä - b\n\n)  # what\n"


def test_the_key_stays_where_lines_above_it_come() -> None:
    source = "def f(a):\n    return a + b\n"
    for one, moved in zip(mutants("core/tiny.py", source), mutants("core/tiny.py", "\n\n" + source), strict=True):
        assert one.key == moved.key and one.name != moved.name


@pytest.mark.parametrize("file", ["driver/async_loop.py", "runtime/futures.py"])
def test_every_mutant_is_another_program_with_the_same_lines(file: str) -> None:
    source = TABLE.source(file).read_text()
    found = mutants(file, source)
    programs = [source, *(one.source for one in found)]
    assert len({ast.dump(ast.parse(program)) for program in programs}) == len(programs) > 20
    assert {program.count("\n") for program in programs} == {source.count("\n")}
    assert len({one.name for one in found}) == len(found)


def test_every_explanation_is_of_a_mutant_that_exists() -> None:
    """A line of explained.txt whose code has changed must be removed, or rewritten if its reason still holds."""
    reasons = explained(TABLE.explained)
    files = {key.partition(" | ")[0] for key in reasons}
    keys = {one.key for file in files for one in mutants(file, TABLE.source(file).read_text())}
    assert reasons and not [key for key in reasons if key not in keys]
    assert all(len(reason) > 10 for reason in reasons.values())


@pytest.mark.parametrize(
    "text",
    [
        "core/kl.py | f | a + b -> a | three parts of a key",
        "core/kl.py | f | a + b | a + b -> a | once\ncore/kl.py | f | a + b | a + b -> a | twice",
    ],
)
def test_an_explanation_in_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "explained.txt").write_text(text)
    with pytest.raises(ValueError, match=r"explained\.txt"):
        explained(tmp_path / "explained.txt")


def test_an_explanation_has_a_key_and_a_reason(tmp_path: Path) -> None:
    key = "core/kl.py | f | a: int | None = b | int | None -> int"
    (tmp_path / "explained.txt").write_text(f"# a note\n\n{key} | the reason\n")
    assert explained(tmp_path / "explained.txt") == {key: "the reason"}
