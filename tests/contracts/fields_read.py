"""Which settings something reads: attributes that code outside `spec/` loads, and those that `spec/` loads for it.

A validator that looks at a field does not make it count. A property or function of `spec/` passes its reads on only
where its own name is read or called by code that counts.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

_CHECKS = {"field_validator", "model_validator", "field_serializer", "model_serializer"}


def names_loaded(tree: ast.AST) -> set[str]:
    """Attributes and plain names that are loaded anywhere below `tree`, and names that are imported from elsewhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def attributes_loaded(tree: ast.AST) -> set[str]:
    """Attributes that are loaded anywhere below `tree`."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def is_check(function: ast.FunctionDef) -> bool:
    """Whether pydantic calls it, to check or to write a value."""
    return bool(names_loaded(ast.Module(body=[ast.Expr(each) for each in function.decorator_list], type_ignores=[]))
                & _CHECKS)  # fmt: skip


def read_fields(outside: Iterable[Path], spec: Iterable[Path]) -> set[str]:
    """Names of attributes that count as read.

    Args:
        outside: files that use the settings.
        spec: files that define them.
    """
    read: set[str] = set()
    used: set[str] = set()
    for path in outside:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read |= attributes_loaded(tree)
        used |= names_loaded(tree)
    functions: list[ast.FunctionDef] = []
    for path in spec:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not is_check(node)]
    waiting = functions
    while True:
        counted = [function for function in waiting if function.name in used]
        if not counted:
            return read
        waiting = [function for function in waiting if function not in counted]
        for function in counted:
            read |= attributes_loaded(function)
            used |= names_loaded(function)
