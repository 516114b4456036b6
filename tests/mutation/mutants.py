"""The mutants of one source file: mutmut's operators, plus removed statements."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

# Text for people and for type checkers: no test is about it.
_SPOKEN = {"print", "say", "show", "TypeVar"}
# mutmut does not change these calls either: without an argument each fails at once.
_CERTAIN = {"len", "isinstance"}
# On a CPU all tensors are on one device, and `zip(strict=True)` is an assertion.
_SILENT = {"device", "strict"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        lines: first and last line of the changed statement in the unchanged file, from 1.
        source: the whole changed file.
        removed: the changed lines before the change, without indentation.
        added: the changed lines after the change, without indentation.
    """

    lines: tuple[int, int]
    source: str
    removed: str
    added: str

    def __str__(self) -> str:
        return f"line {self.lines[0]}: {self.removed}  ->  {self.added}"


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.changes: list[tuple[cst.CSTNode, cst.CSTNode | cst.RemovalSentinel, tuple[int, int]]] = []
        self._statements: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Raise | cst.Import | cst.ImportFrom | cst.Assert):
            return False
        if isinstance(node, cst.Call) and _name(node.func) in _SPOKEN | _CERTAIN:
            return False
        if isinstance(node, cst.Arg) and _is_silent(node):
            return False
        if isinstance(node, cst.SimpleStatementLine):
            self._statements.append(self._lines(node))
            if self._is_call(node):
                self._note(node, cst.RemoveFromParent())
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and operator is not operator_string:
                for changed in operator(node):
                    if not (isinstance(node, cst.Call) and isinstance(changed, cst.Call) and _quietly(node, changed)):
                        self._note(node, changed)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.SimpleStatementLine):
            self._statements.pop()

    def _note(self, node: cst.CSTNode, changed: cst.CSTNode | cst.RemovalSentinel) -> None:
        self.changes.append((node, changed, self._statements[-1] if self._statements else self._lines(node)))

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        span = self.get_metadata(PositionProvider, node)
        return span.start.line, span.end.line

    @staticmethod
    def _is_call(node: cst.SimpleStatementLine) -> bool:
        only = node.body[0]
        return len(node.body) == 1 and isinstance(only, cst.Expr) and isinstance(only.value, cst.Call)


class _Replace(cst.CSTTransformer):
    """Replaces the node `old` by `new`; a removed statement becomes `pass`."""

    def __init__(self, old: cst.CSTNode, new: cst.CSTNode | cst.RemovalSentinel) -> None:
        self._old, self._new = old, new

    def on_visit(self, node: cst.CSTNode) -> bool:
        return node is not self._old

    def on_leave(self, original: cst.CSTNode, updated: cst.CSTNode) -> cst.CSTNode | cst.RemovalSentinel:
        if original is not self._old:
            return updated
        if isinstance(self._new, cst.RemovalSentinel):
            return cst.ensure_type(updated, cst.SimpleStatementLine).with_changes(body=[cst.Pass()])
        return self._new


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a file that is valid Python, each change once, in file order."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = _Visitor()
    wrapper.visit(visitor)
    seen = {source}
    for old, new, lines in visitor.changes:
        changed = wrapper.module.visit(_Replace(old, new)).code
        if changed in seen or not _compiles(changed):
            continue
        seen.add(changed)
        removed, added = _difference(source, changed)
        yield Mutant(lines, changed, removed, added)


def _name(node: cst.BaseExpression) -> str:
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def _is_silent(argument: cst.Arg) -> bool:
    return argument.keyword is not None and argument.keyword.value in _SILENT


def _quietly(before: cst.Call, after: cst.Call) -> bool:
    """Whether the two calls differ in an argument that no test on a CPU can detect."""
    kept = {id(argument) for argument in after.args}
    return any(_is_silent(argument) and id(argument) not in kept for argument in before.args)


def _compiles(source: str) -> bool:
    try:
        compile(source, "<mutant>", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _difference(before: str, after: str) -> tuple[str, str]:
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return _joined(lines, "- "), _joined(lines, "+ ")


def _joined(lines: Iterable[str], mark: str) -> str:
    return " ".join(line[2:].strip() for line in lines if line.startswith(mark))
