"""Mutants of one source file: copies that differ in one small change, which a test should detect.

Changes are found in the syntax tree and spliced into the text, so that line numbers and comments stay. Excluded is what
no test should have to detect: docstrings, annotations, messages (f-strings; raised, logged or printed texts),
decorators, protocols, and assignments whose deletion leaves a name without a value.
"""

from __future__ import annotations

import ast
from collections import Counter
from copy import copy
from dataclasses import dataclass

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_PAIRS = (("min", "max"), ("any", "all"), ("floor", "ceil"), ("minimum", "maximum"), ("argmin", "argmax"))
_NAMES = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
_MESSAGES = {"print", "warn", "warning", "info", "debug", "error", "exception"}
_TYPE_ARGUMENTS = {
    "Callable",
    "Sequence",
    "Mapping",
    "Iterable",
    "Iterator",
    "Literal",
    "type",
    "tuple",
    "dict",
    "list",
}
_LOSABLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Break, ast.Continue, ast.Raise, ast.Assert, ast.Delete)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of `file` (a path under the package): `before` at `line` and `column` became `after`."""

    file: str
    function: str  # qualified name; empty at module level
    line: int
    column: int
    kind: str
    code: str  # the whole line as it was, stripped
    before: str
    after: str
    source: str  # the whole mutated file

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}+{len(self.before)}:{self.kind}"

    @property
    def key(self) -> str:
        """Key of an explanation, which does not change when lines above are added or removed."""
        return " | ".join((self.file, self.function, self.code, f"{self.before} -> {self.after}"))


def mutants(file: str, source: str) -> list[Mutant]:
    """Return all mutants in the order of the text; none equals the source or another mutant."""
    found: list[Mutant] = []
    taken: set[tuple[ast.stmt | ast.expr, str]] = set()
    for function, node, kind, replacement in _Finder(source).found:
        if replacement != ast.unparse(node) and (node, replacement) not in taken:
            taken.add((node, replacement))
            code = source.splitlines()[node.lineno - 1].strip()
            before = " ".join((ast.get_source_segment(source, node) or "").split())
            found.append(
                Mutant(
                    file=file,
                    function=function,
                    line=node.lineno,
                    column=node.col_offset + 1,
                    kind=kind,
                    code=code,
                    before=before,
                    after=replacement,
                    source=_spliced(source, node, replacement),
                )
            )
    return sorted(found, key=lambda one: (one.line, one.column, one.kind))


def _spliced(source: str, node: ast.stmt | ast.expr, replacement: str) -> str:
    """Return the text with the node replaced and no line moved; columns of a syntax tree count bytes."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    stop = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = source.encode()
    gone = text[start:stop].count(b"\n")
    kept_lines = replacement.encode() + b"\n" * gone
    inside = kept_lines if isinstance(node, ast.stmt) else b"(" + kept_lines + b")"
    return (text[:start] + inside + text[stop:]).decode()


Change = tuple[str, ast.stmt | ast.expr, str, str]  # function, node, kind, replacement


class _Finder(ast.NodeVisitor):
    """Collects the changes of a syntax tree and skips the excluded parts."""

    def __init__(self, source: str) -> None:
        self.found: list[Change] = []
        self._scopes: list[str] = []
        self._bound: list[Counter[str]] = [Counter()]
        tree = ast.parse(source)
        self._modules = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        self.visit(tree)

    def _add(self, node: ast.stmt | ast.expr, kind: str, replacement: str | ast.expr) -> None:
        text = replacement if isinstance(replacement, str) else ast.unparse(replacement)
        self.found.append((".".join(self._scopes), node, kind, text))

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert) or _is_docstring(node):
            if isinstance(node, ast.Raise | ast.Assert):
                self._add(node, "delete", "pass")
            if isinstance(node, ast.Assert):
                self.visit(node.test)
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) in _MESSAGES:
            return
        if isinstance(node, _LOSABLE) and not self._binds_alone(node):
            self._add(node, "delete", "pass")
        super().visit(node)

    def _binds_alone(self, node: ast.stmt) -> bool:
        """Return whether a name has no value without the assignment, which any covering test would detect."""
        if not isinstance(node, ast.Assign):
            return False
        if len(self._scopes) == 0:
            return True
        names = [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        plain = all(isinstance(target, ast.Name | ast.Tuple) for target in node.targets)
        return plain and any(self._bound[-1][name] == 1 for name in names)

    def _scope(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        stores = [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
        arguments = [one.arg for one in ast.walk(node) if isinstance(one, ast.arg)]
        self._bound.append(Counter([*stores, *arguments]))
        self._scopes.append(node.name)
        for child in node.body:
            self.visit(child)
        self._scopes.pop()
        self._bound.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self._scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
            self._scope(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            if not isinstance(node.target, ast.Name):
                self._add(node, "delete", "pass")

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1) and not _is_not(test):  # negated below
            self._add(test, "negate", f"not ({ast.unparse(test)})")

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._add(test, "drop filter", "True")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for index, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                changed = copy(node)
                changed.ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                which = f"comparison {index + 1}" if len(node.ops) > 1 else "compare"
                self._add(node, f"{which} by {other.__name__}", changed)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, f"join by {type(other).__name__}", ast.BoolOp(op=other, values=node.values))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right)):
            self._add(node, "left alone", node.left)
            self._add(node, "right alone", node.right)
            if other := _OPERATORS.get(type(node.op)):
                self._add(node, f"compute by {other.__name__}", ast.BinOp(left=node.left, op=other(), right=node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if other := _OPERATORS.get(type(node.op)):
            changed = ast.AugAssign(target=node.target, op=other(), value=node.value)
            self._add(node, f"compute by {other.__name__}", ast.unparse(changed))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._add(node, "drop sign", node.operand)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in _TYPE_ARGUMENTS:
            return
        if isinstance(node.ctx, ast.Load):
            self._add(node, "drop subscript", node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node) in ("cast", "TypeVar", "getLogger"):
            return
        for index, keyword in enumerate(node.keywords):
            kept = [*node.keywords[:index], *node.keywords[index + 1 :]]
            self._add(
                node,
                f"drop {keyword.arg or f'** {index + 1}'}=",
                ast.Call(func=node.func, args=node.args, keywords=kept),
            )
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            receiver = node.func.value
            if not isinstance(receiver, ast.Name) or receiver.id not in self._modules:
                self._add(node, f"drop {node.func.attr}()", receiver)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _NAMES:
            self._add(node, "opposite", _NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _NAMES:
            self._add(node, "opposite", ast.Attribute(value=node.value, attr=_NAMES[node.attr], ctx=ast.Load()))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, "opposite", repr(not node.value))
        elif isinstance(node.value, int):
            self._add(node, "one more", repr(node.value + 1))
        elif isinstance(node.value, float):
            self._add(node, "one more", repr(node.value + 1.0) if node.value < 2**53 else repr(node.value * 2))


def _is_docstring(node: ast.AST) -> bool:
    """Return whether the node is a docstring or the `...` of an empty body."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
