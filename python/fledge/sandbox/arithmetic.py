"""L0, the calculator: evaluates one arithmetic expression in process, with every cost bounded.

Most tool calls of a small model are sums. They need neither a process nor an interpreter: this
module walks the syntax tree of `(347+58)*3`, `7/2` or `"lantern".count("n")` by a whitelist and
computes each node only after checking that the result is small. Called by `fledge.engine.tools`
(the default python tool tries it first) and, through a callable, by the makers of training data, so
that a trace shows exactly what the tool will say. It never calls eval, never looks up a name
outside its own tables, never touches attributes of values, and never allocates more than kilobytes.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import threading
from collections.abc import Callable

from fledge.sandbox.result import ToolError

MAX_LENGTH = 512  # characters of the expression
MAX_NODES = 200
MAX_DEPTH = 64
MAX_BITS = 4096  # of any integer, intermediate ones too; 1,234 digits, below CPython's str limit
MAX_ROUND_DIGITS = 100
FLOAT_DIGITS = 10  # significant digits shown
EXACT_FLOAT = 2.0**53  # above it the digits of an integral float are noise

Value = int | float | str | bool


class NotArithmetic(ToolError):
    """The expression may be fine Python, but it is outside the calculator's little language."""


# CPython 3.11 counts the depth of a tree that it builds once for all threads, so that two threads
# that parse at the same time can end in a SystemError (python/cpython#106905). The engine's tools
# run in several.
_PARSING = threading.Lock()

# A digit run into a name (`1or 2`, `0x1for`) makes CPython's tokenizer *warn*; such text is not
# arithmetic anyway. 1e5 and 1_000 pass.
_DIGIT_THEN_NAME = re.compile(r"[0-9]\.?(?![eE][+-]?[0-9])[A-Za-z]")
_STRING = re.compile(r"\"[^\"]*\"|'[^']*'")


def evaluate(expression: str) -> str:
    """The value of `expression` as the training data writes it: `10/2` -> "5", `7/2` -> "3.5".

    Raises ToolError for what fails (division by zero) and its subclass NotArithmetic for what is
    not in the calculator's language or over its bounds. Costs under a millisecond for any input.
    """
    return format_value(_Evaluator().value(parse(expression), depth=1))


def parse(expression: str) -> ast.expr:
    """The checked syntax tree of one expression; NotArithmetic if it is none or too long."""
    if len(expression) > MAX_LENGTH:
        raise NotArithmetic(f"the expression is longer than {MAX_LENGTH} characters")
    source = expression.strip()
    if "\\" in source or "#" in source or _DIGIT_THEN_NAME.search(_STRING.sub('""', source)):
        raise NotArithmetic("SyntaxError: not an arithmetic expression")
    try:
        with _PARSING:
            tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise NotArithmetic("SyntaxError: not an arithmetic expression") from None
    return tree


def format_value(value: Value) -> str:
    """Ints as ints, integral floats as ints, other floats to 10 significant digits, text as it is.

    >>> format_value(10.0), format_value(0.1 + 0.2), format_value(2 / 3)
    ('10', '0.3', '0.6666666667')
    """
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value) or math.isinf(value):
        raise ToolError("OverflowError: result too large")
    if value.is_integer() and abs(value) < EXACT_FLOAT:
        return str(int(value))
    return f"{value:.{FLOAT_DIGITS}g}"


class _Evaluator:
    """Walks one tree; counts nodes and depth as it goes."""

    def __init__(self) -> None:
        self.nodes = 0

    def value(self, node: ast.expr, *, depth: int) -> Value:
        """The value of `node`, its bounds checked before anything is computed."""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise NotArithmetic("the expression is too large for the calculator")
        match node:
            case ast.Constant(value=constant) if type(constant) in (int, float, str):
                return _bounded(constant)  # type: ignore[arg-type]
            case ast.BinOp(left=left, op=op, right=right):
                return _binary(
                    op, self._number(left, depth=depth), self._number(right, depth=depth)
                )
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand, depth=depth)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._number(operand, depth=depth)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(left, op, right, depth=depth)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._function(name, args, depth=depth)
            case ast.Call(func=ast.Attribute(value=owner, attr=name), args=args, keywords=[]):
                return self._method(owner, name, args, depth=depth)
        raise NotArithmetic(f"the calculator does not know {_kind(node)}")

    def _number(self, node: ast.expr, *, depth: int) -> int | float:
        value = self.value(node, depth=depth + 1)
        if type(value) not in (int, float):
            raise NotArithmetic("the calculator computes with numbers only")
        return value  # type: ignore[return-value]

    def _text(self, node: ast.expr, *, depth: int) -> str:
        value = self.value(node, depth=depth + 1)
        if not isinstance(value, str):
            raise NotArithmetic("the calculator expects a string here")
        return value

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr, *, depth: int) -> bool:
        compare = _COMPARISONS.get(type(op))
        if compare is None:
            raise NotArithmetic(f"the calculator does not know {_kind(op)}")
        return compare(self._number(left, depth=depth), self._number(right, depth=depth))

    def _function(self, name: str, args: list[ast.expr], *, depth: int) -> Value:
        match name, args:
            case "len", [text]:
                return len(self._text(text, depth=depth))
            case "abs", [number]:
                return abs(self._number(number, depth=depth))
            case (("min" | "max"), [_, _, *_]):
                numbers = [self._number(a, depth=depth) for a in args]
                return min(numbers) if name == "min" else max(numbers)
            case "int", [number]:
                return _whole(self._number(number, depth=depth))
            case "round", [number]:
                return _round(self._number(number, depth=depth), None)
            case "round", [number, digits]:
                return _round(self._number(number, depth=depth), self._number(digits, depth=depth))
        raise NotArithmetic(f"the calculator does not know {name}() with {len(args)} arguments")

    def _method(self, owner: ast.expr, name: str, args: list[ast.expr], *, depth: int) -> Value:
        match name, args:
            case "count", [part]:
                return self._text(owner, depth=depth).count(self._text(part, depth=depth))
            case "upper", []:
                return _bounded(self._text(owner, depth=depth).upper())
            case "lower", []:
                return _bounded(self._text(owner, depth=depth).lower())
        raise NotArithmetic(f"the calculator does not know .{name}() with {len(args)} arguments")


def _binary(op: ast.operator, left: int | float, right: int | float) -> int | float:
    """left op right; the size of an integer result is bounded before it is computed."""
    compute = _OPERATORS.get(type(op))
    if compute is None:
        raise NotArithmetic(f"the calculator does not know {_kind(op)}")
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(op, left, right)
    elif not isinstance(op, _FLOAT_OPERATORS):
        raise ToolError("TypeError: that operator needs whole numbers")
    try:
        result = compute(left, right)
    except ZeroDivisionError:
        raise ToolError("ZeroDivisionError: division by zero") from None
    except OverflowError:
        raise ToolError("OverflowError: result too large") from None
    except ValueError:
        raise ToolError("ValueError: negative shift count") from None
    if isinstance(result, complex):
        raise NotArithmetic("the calculator has no complex numbers")
    _bounded(result)
    return result


def _check_bits(op: ast.operator, left: int, right: int) -> None:
    """NotArithmetic if an integer result could have more than MAX_BITS bits."""
    a, b = left.bit_length(), right.bit_length()
    bits = max(a, b) + 1
    if isinstance(op, ast.Mult):
        bits = a + b
    elif isinstance(op, ast.LShift):
        bits = a + right if left and right > 0 else a
    elif isinstance(op, ast.Pow) and a > 1:  # 0, 1 and -1 stay small whatever the exponent
        bits = int(min(abs(right), MAX_BITS + 1) * math.log2(abs(left))) + 1
    if bits > MAX_BITS:
        raise NotArithmetic("OverflowError: result too large")


def _whole(number: int | float) -> int:
    try:
        return int(number)
    except (OverflowError, ValueError):
        raise ToolError("OverflowError: result too large") from None


def _round(number: int | float, digits: int | float | None) -> int | float:
    if digits is None:
        return round(number)
    if not isinstance(digits, int):
        raise ToolError("TypeError: round() needs a whole number of digits")
    if abs(digits) > MAX_ROUND_DIGITS:  # round(5, -10**9) would build 10**(10**9)
        raise NotArithmetic("OverflowError: too many digits")
    return round(number, digits)


def _bounded(value: Value) -> Value:
    """`value` if it is within the bounds, else an error."""
    if isinstance(value, str) and len(value) > 3 * MAX_LENGTH:  # upper() may triple a string
        raise NotArithmetic("the string is too long for the calculator")
    if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
        raise ToolError("OverflowError: result too large")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise NotArithmetic("OverflowError: result too large")
    return value


def _kind(node: ast.AST) -> str:
    return type(node).__name__


_OPERATORS: dict[type[ast.operator], Callable[..., int | float | complex]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_FLOAT_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARISONS: dict[type[ast.cmpop], Callable[[int | float, int | float], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
