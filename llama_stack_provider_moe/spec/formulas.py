"""The formula of a `multi` grader: parsed with `ast`, checked, and computed node by node; never run as code."""

import ast
import math
import re
from collections.abc import Callable, Mapping

from llama_stack_provider_moe.spec.grader_base import Range

MAX_CHARACTERS = 2_000
MAX_NODES = 400
MAX_DEPTH = 24
_TOKEN = re.compile(r"\s+|[A-Za-z_]\w*|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])|[-+*/(),]", re.ASCII)
_TWO: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}
_ONE: dict[type[ast.unaryop], Callable[[float], float]] = {
    ast.UAdd: lambda value: value,
    ast.USub: lambda value: -value,
}
# Name -> function, fewest and most arguments.
FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 1, 32),
    "max": (max, 1, 32),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "log": (math.log, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
}
ANY: Range = (-math.inf, math.inf)
_EXPECTED = f"names of graders, numbers, + - * /, parentheses and {', '.join(FUNCTIONS)}"


class Formula:
    """A formula.

    Args:
        text: as written.

    Attributes:
        names: the graders that it names.

    Raises:
        ValueError: it is too long or too deep, or has something else than a formula may have.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"a formula of {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
        at = 0
        while at < len(text):  # before Python's parser sees it, which warns of what it finds odd
            token = _TOKEN.match(text, at)
            if token is None:
                raise ValueError(f"{text[at : at + 20]!r} is not valid in a formula; expected {_EXPECTED}")
            at = token.end()
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{text[:80]!r} is not a formula; expected {_EXPECTED}") from None
        self._nodes = 0
        self.names: set[str] = set()
        self._check(tree, 0)
        self._tree = tree

    def value(self, scores: Mapping[str, float]) -> float:
        """Compute the formula.

        Args:
            scores: of each grader in `names`.

        Raises:
            ArithmeticError: a division by zero, the logarithm of no positive number, or a number too large.
        """
        try:
            found = float(_computed(self._tree, scores))
        except ValueError as error:  # `math` says so of log(-1)
            raise ArithmeticError(str(error)) from None
        if not math.isfinite(found):
            raise ArithmeticError("the result is not a finite number")
        return found

    def range(self, ranges: Mapping[str, Range]) -> Range:
        """Bounds of the formula's values, by interval arithmetic: no value is outside, but some inside may not occur.

        Args:
            ranges: least and largest value of each grader in `names`.
        """
        return _bounds(self._tree, ranges)

    def _check(self, node: ast.expr, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(f"a formula of more than {MAX_NODES} terms or {MAX_DEPTH} levels; expected fewer")
        match node:
            case ast.Name(id=name):
                self.names.add(name)
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                if not abs(number) < 1e300:
                    raise ValueError("a number in a formula is too large; expected one below 1e300")
            case ast.UnaryOp(op=operator, operand=operand) if type(operator) in _ONE:
                self._check(operand, depth + 1)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _TWO:
                self._check(left, depth + 1)
                self._check(right, depth + 1)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                _, least, most = FUNCTIONS[name]
                if not least <= len(arguments) <= most:
                    raise ValueError(f"{name} of {len(arguments)} values; expected {least} to {most}")
                for each in arguments:
                    self._check(each, depth + 1)
            case _:
                raise ValueError(f"{ast.unparse(node)[:80]!r} is not valid in a formula; expected {_EXPECTED}")


def _computed(node: ast.expr, scores: Mapping[str, float]) -> float:
    match node:
        case ast.Name(id=name):
            return scores[name]
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=operator, operand=operand):
            return _ONE[type(operator)](_computed(operand, scores))
        case ast.BinOp(left=left, op=operation, right=right):
            return _TWO[type(operation)](_computed(left, scores), _computed(right, scores))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name][0](*(_computed(each, scores) for each in arguments))
    raise AssertionError(f"{type(node).__name__} was not refused")


def _bounds(node: ast.expr, ranges: Mapping[str, Range]) -> Range:
    match node:
        case ast.Name(id=name):
            return ranges[name]
        case ast.Constant(value=int() | float() as number):
            return float(number), float(number)
        case ast.UnaryOp(op=operator, operand=operand):
            low, high = _bounds(operand, ranges)
            return (-high, -low) if isinstance(operator, ast.USub) else (low, high)
        case ast.BinOp(left=left, op=operation, right=right):
            return _bounds_of_two(operation, _bounds(left, ranges), _bounds(right, ranges))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _bounds_of_call(name, [_bounds(each, ranges) for each in arguments])
    raise AssertionError(f"{type(node).__name__} was not refused")


def _bounds_of_two(operation: ast.operator, left: Range, right: Range) -> Range:
    if isinstance(operation, ast.Add | ast.Sub):
        low, high = right if isinstance(operation, ast.Add) else (-right[1], -right[0])
        corners = [left[0] + low, left[1] + high]
    elif isinstance(operation, ast.Div) and right[0] <= 0 <= right[1]:
        return ANY  # as large as the divisor is small
    else:
        corners = [
            0.0 if isinstance(operation, ast.Mult) and 0 in (one, other) else _TWO[type(operation)](one, other)
            for one in left
            for other in right
        ]
    return ANY if any(map(math.isnan, corners)) else (min(corners), max(corners))


def _bounds_of_call(name: str, ranges: list[Range]) -> Range:
    low, high = ranges[0]
    match name:
        case "min" | "max":
            chosen: Callable[..., float] = min if name == "min" else max
            return chosen(each[0] for each in ranges), chosen(each[1] for each in ranges)
        case "abs":
            ends = sorted((abs(low), abs(high)))
            return (0.0 if low <= 0 <= high else ends[0]), ends[1]
        case "log" | "sqrt" if high < 0 or (name == "log" and high == 0):
            return ANY  # it has no value
        case "log":
            low = -math.inf if low <= 0 else low
        case "sqrt":
            low = max(low, 0.0)
    return _end(name, low, -math.inf), _end(name, high, math.inf)


def _end(name: str, value: float, outside: float) -> float:
    """The end of a rising function's range. A library's `exp` and `log` may round inwards: some steps outwards."""
    if name == "exp" and not math.isinf(value) and value > 709:
        return math.inf if outside > 0 else math.exp(709)
    if math.isinf(value):
        return 0.0 if name == "exp" and value < 0 else value
    found = float(FUNCTIONS[name][0](value))
    return math.nextafter(found, outside, steps=4) if name in ("exp", "log") else found
