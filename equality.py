"""Is it the same mathematics? Decides whether an answer equals a reference.

In:   the text of an answer, the reference, the contents of the choices where there are any.
Out:  (equal, how that was found: by_number, by_string, by_value, or refused).

    normalise (one spelling) → decide (choices, words) → equal (names, units, percent, rounding)
                             → read (equality.lark and ValueBuilder: sympy's objects) → same (part by part)

Two answers are equal if they have the same value. Rational constants are compared exactly, other constants and
expressions with symbols to at least 200 digits, the latter at fixed points in general position. docs/grader.md says
what is equal and what is not. Nothing of an answer is ever run as code: lark reads it with a grammar of our own, no
string reaches sympy's parsers, nothing is solved, and what is too large is refused before it is built.

Only grading processes import this file; reward.py starts them.
"""

import functools
import math
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import mpmath
import sympy
from lark import Lark, LarkError, Transformer, v_args

# Work is refused before it starts if it is more than any of 5,238 real references needs.
MAX_CHARS = 1000
MAX_BRACKETS = 100  # opening brackets of one kind
MAX_FACTORIAL = 20000  # n of n!
MAX_BITS = 1 << 17  # of a power that is written out; 2013^2014 has 22,000
MAX_DIGITS = 30000  # of the value of an expression
DIGITS = 250  # of the value of an expression whose terms are of similar size
TRIALS = 5  # points at which expressions with symbols are compared
NEGATIVE = 4  # the one at which symbols are negative
CACHE_SIZE = 4096  # answers repeat: the 64 responses to a question have one reference

# -- values: read by the grammar, built as sympy objects within bounds ------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Several values: a list, set, tuple, row, ratio (divided by its first part), class (3 mod 7), chain or union."""

    kind: str
    items: tuple


@dataclass(frozen=True)
class Relation:
    """0 = difference, and the same with <, ≤ or ≠."""

    sign: str
    difference: sympy.Expr


@dataclass(frozen=True)
class Solution:
    """The numbers that a bound leaves for a symbol: x < 2, |x| ≤ 2, x ≠ 2, 0 < x < a."""

    symbol: sympy.Symbol
    numbers: sympy.Set | Parts
    relation: Relation | None = None  # the bound as it is written, if it is one relation


INFINITE = {sympy.oo, -sympy.oo, sympy.zoo, sympy.nan}
CONSTANTS = {
    "i": sympy.I,
    "e": sympy.E,
    "π": sympy.pi,
    "∞": sympy.oo,
    "∅": sympy.EmptySet,
}
FUNCTIONS = {
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "arccot": sympy.acot,
    "ln": sympy.log,
    "lg": lambda x: sympy.log(x, 10),
    "abs": sympy.Abs,
    "min": sympy.Min,
    "max": sympy.Max,
    "ceil": sympy.ceiling,
}
FLIPPED = {">": "<", "≥": "≤"}
LEFT_BRACKETS = {"<": "(", "≤": "["}
RIGHT_BRACKETS = {"<": ")", "≤": "]"}


def finite(value):
    """The value itself; raises ValueError where it is no number. Infinity is a bound and an answer, but not a number here:
    2∞, ∞ + 5, 1/0 and x = ∞ have no value."""
    is_number = isinstance(value, sympy.Expr | sympy.MatrixBase)
    if not is_number or value in INFINITE:
        raise ValueError("not a finite number")
    return value


def is_real(value) -> bool:
    """Whether a value is a real number or ±∞: no symbol, no list."""
    is_number = isinstance(value, sympy.Expr) and value.is_number
    return is_number and value.is_extended_real is True


def small(n):
    """n itself; raises ValueError where n! is too large to write out."""
    is_number = finite(n).is_number
    if is_number and not abs(n.evalf(5)) <= MAX_FACTORIAL:
        raise ValueError("too large to write out")
    return n


def power(base, exponent):
    """base^exponent; raises ValueError where its numbers are too large to write out."""
    if finite(exponent).is_number and finite(base) not in (0, 1, -1):
        numbers = base.atoms(sympy.Rational)
        bits = [max(n.p.bit_length(), n.q.bit_length()) for n in numbers]
        size = abs(exponent.evalf(5)) * max(bits, default=1)
        if not size <= MAX_BITS:
            raise ValueError("too large to write out")
    return finite(base**exponent)


def interval(left: str, low, high, right: str) -> sympy.Set | Parts:
    """The interval [a, b) or the like: a set of numbers if both ends are numbers, else its parts."""
    if not (is_real(low) and is_real(high)):
        kind = left + right
        return Parts("tuple" if kind == "()" else kind, (low, high))
    if not (high - low).is_extended_positive:
        raise ValueError("an interval without a point")
    return sympy.Interval(low, high, left == "(", right == ")")


def as_set(value) -> sympy.Set | None:
    """The set of numbers that is written as an interval, as (1, 2), as {1, 2} or as bounds of a symbol; else None."""
    if isinstance(value, Solution):
        value = value.numbers
    if isinstance(value, Parts):
        are_real = all(map(is_real, value.items))
        if value.kind == "tuple" and are_real and len(value.items) == 2:
            low, high = value.items
            return interval("(", low, high, ")") if (high - low).is_extended_positive else None
        if value.kind == "set" and are_real:
            return sympy.FiniteSet(*value.items)
    return value if isinstance(value, sympy.Set) else None


def stated_set(numbers: sympy.Set) -> sympy.Set | Parts:
    """The set as a value: a finite set becomes the same as one in braces. Raises ValueError where no number is left: such
    an answer states nothing, and is not the answer ∅."""
    if numbers == sympy.EmptySet:
        raise ValueError("states nothing")
    if isinstance(numbers, sympy.FiniteSet):
        return Parts("set", tuple(numbers))
    return numbers


def solution(a, sign: str, b) -> Solution | None:
    """The numbers that a < b (≤, ≠) leaves for x if one side is a symbol x, or the left one |x|, and the other side is a
    number. Nothing else is solved: None."""
    symbol, number = (a, b) if is_real(b) else (b, a)
    is_absolute = symbol is a and isinstance(a, sympy.Abs) and sign != "≠"
    if is_absolute:
        symbol = a.args[0]
    if not isinstance(symbol, sympy.Symbol) or not is_real(number):
        return None
    relation = None if number in INFINITE else Relation(sign, b - a)
    if sign == "≠":
        numbers = sympy.Reals - sympy.FiniteSet(number)
        return Solution(symbol, numbers, relation)
    left, right = LEFT_BRACKETS[sign], RIGHT_BRACKETS[sign]
    if is_absolute:
        numbers = interval(left, -b, b, right)
    elif is_real(b):
        numbers = interval("(", -sympy.oo, b, right)
    else:
        numbers = interval(left, a, sympy.oo, ")")
    return Solution(symbol, numbers, relation)


def combined(operation, items) -> Solution | None:
    """The union or intersection of several bounds of one symbol; None if the items are anything else."""
    symbols = {item.symbol if isinstance(item, Solution) else None for item in items}
    if len(symbols) > 1 or None in symbols:
        return None
    sets = [as_set(item) for item in items]
    if None in sets:
        return None
    return Solution(symbols.pop(), operation(*sets))


@v_args(inline=True)
class ValueBuilder(Transformer):
    """Builds sympy's objects: one method for each alias of the grammar."""

    def number(self, text):
        digits, _, exponent = text.lower().partition("e")
        exponent = sympy.Integer(exponent or 0)
        return sympy.Rational(str(digits)) * power(sympy.Integer(10), exponent)

    def name(self, text):
        return CONSTANTS[text] if text in CONSTANTS else sympy.Symbol(str(text))

    # numbers

    def add(self, a, b):
        return finite(finite(a) + finite(b))

    def subtract(self, a, b):
        return finite(finite(a) - finite(b))

    def multiply(self, a, b):
        return finite(finite(a) * finite(b))

    def divide(self, a, b):
        return finite(finite(a) / finite(b))

    def negate(self, a):
        return -a

    def power(self, base, exponent):
        return power(base, exponent)

    def percent(self, a):
        return finite(a) / 100

    def degrees(self, a):
        return finite(a) * sympy.pi / 180

    def sqrt(self, a):
        return sympy.sqrt(finite(a))

    def root(self, n, a):
        if a.is_number and n.is_odd:
            return sympy.real_root(finite(a), n)
        return power(a, 1 / finite(n))

    def factorial(self, n):
        return finite(sympy.factorial(small(n)))

    def factorial2(self, n):
        return finite(sympy.factorial2(small(n)))

    def binomial(self, n, k):
        return finite(sympy.binomial(small(n), small(k)))

    def call(self, name, base, exponent, argument):
        """\\log_2 x, \\sin^2 x, \\max(a, b)."""
        name = name.removeprefix("\\")
        arguments = argument.items if isinstance(argument, Parts) else (argument,)
        if name in ("gcd", "lcm") and not all(item.is_Integer for item in arguments):
            raise ValueError("a divisor of symbols is not computed")
        function = FUNCTIONS.get(name) or getattr(sympy, name)
        value = finite(function(*map(finite, arguments)))
        if base is not None:
            value = self.divide(value, sympy.log(finite(base)))
        return value if exponent is None else power(value, exponent)

    # what is more than one number

    def several(self, *items):
        """A list. But bounds of one symbol become their intersection if they are joined by "and", or by commas and the
        intersection is not empty; else their union if they are joined by "or" or by commas."""
        values, signs = items[::2], set(items[1::2])
        both = combined(sympy.Intersection, values) if "∨" not in signs else None
        if both and both.numbers == sympy.EmptySet:
            if "∧" in signs:
                raise ValueError("states nothing")
            both = None
        either = combined(sympy.Union, values) if "∧" not in signs else None
        return both or either or Parts("list", values)

    def set(self, *items):
        return Parts("set", items)

    def tuple(self, *items):
        return Parts("tuple", items)

    def row(self, *items):
        return Parts("row", tuple(map(finite, items)))

    def matrix(self, *rows):
        rows = [row if isinstance(row, Parts) else self.row(row) for row in rows]
        return sympy.ImmutableMatrix([self.row(*row.items).items for row in rows])

    def ratio(self, first, *others):
        if len(others) == 1:
            return self.divide(first, others[0])
        quotients = [self.divide(other, first) for other in others]
        return Parts("ratio", tuple(quotients))

    def modulo(self, a, n):
        if n.is_number and not (n.is_Integer and n > 0):
            raise ValueError("no modulus")
        return Parts("class", (finite(a) % finite(n), n))

    # sets and relations

    def closed(self, low, high):
        return interval("[", low, high, "]")

    def left_open(self, low, high):
        return interval("(", low, high, "]")

    def right_open(self, low, high):
        return interval("[", low, high, ")")

    def union(self, *values):
        sets = [as_set(value) for value in values]
        if None in sets:  # intervals whose ends have symbols
            return Parts("union", values)
        return stated_set(sympy.Union(*sets))

    def intersection(self, *values):
        sets = [as_set(value) for value in values]
        return stated_set(sympy.Intersection(*sets))

    def difference(self, a, b):
        return stated_set(as_set(a) - as_set(b))

    def relation(self, a, sign, b):
        if sign in FLIPPED:
            a, sign, b = b, FLIPPED[sign], a
        sign = str(sign)
        bound = solution(a, sign, b) if sign != "=" else None
        return bound or Relation(sign, self.subtract(b, a))

    def chain(self, a, sign, b, other, c):
        """a < x ≤ b."""
        if sign in FLIPPED and other in FLIPPED:
            a, c = c, a
            sign, other = FLIPPED[other], FLIPPED[sign]
        left, right = LEFT_BRACKETS.get(sign), RIGHT_BRACKETS.get(other)
        if left and right and isinstance(b, sympy.Symbol):
            return Solution(b, interval(left, a, c, right))
        return Parts(f"chain {sign}{other}", (a, b, c))


PARSER = Lark.open("equality.lark", rel_to=__file__, parser="lalr", transformer=ValueBuilder())
NAME = PARSER.get_terminal("NAME").pattern.value
FUNCTION = PARSER.get_terminal("FUNCTION").pattern.value.removeprefix(r"\\")
VARIABLE = rf"(?![eiπ∞∅…](?!_)){NAME}"  # a letter that is a variable, not a constant

# What lark, sympy and the bounds above raise for an answer that is not read. NotImplementedError is a RuntimeError.
ERRORS = (
    ValueError,
    ArithmeticError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    MemoryError,
    LarkError,
)


@functools.lru_cache(CACHE_SIZE)
def read(text: str):
    """The value of a normalised text; None if it is not read or too large."""
    # Words and numbers side by side are not products, and 11:50 is a time.
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{4}|(?<![_\d^])\d+ \.?\d|^\d?\d:[0-5]\d$", text):
        return None
    try:
        return PARSER.parse(text)
    except ERRORS:
        return None


# -- same: the same value, part by part --------------------------------------------------------------------------------


def sample(name: str, trial: int) -> sympy.Rational:
    """A fixed value for a symbol, scattered by a hash: values on a regular grid could make x + y equal x_1 + x_2. Symbols
    such as n get whole numbers; the others are negative at one trial."""
    scattered = zlib.crc32(f"{name} {trial}".encode())
    if name[0] in "jklmnN":
        return sympy.Integer(scattered % 11 + 2)
    return sympy.Rational(scattered % 997 + 500, -1000 if trial == NEGATIVE else 1000)


def sample_point(expression, trial: int) -> dict:
    return {symbol: sample(symbol.name, trial) for symbol in expression.free_symbols}


@functools.lru_cache(CACHE_SIZE)
def digits_needed(expression, trial: int) -> int:
    """How many digits to compute: 250, or more if terms of a sum are so far apart that 250 would lose the smaller one."""
    point = sample_point(expression, trial)
    terms = {expression}
    for term in expression.atoms(sympy.Add):
        terms.update(term.args)
    bits = 0
    for term in terms:
        size = abs(term.evalf(15, subs=point))
        if size != 0:
            bits = max(bits, abs(mpmath.mag(size)))
    digits = 200 + bits * math.log10(2)
    return DIGITS * math.ceil(digits / DIGITS)


@functools.lru_cache(CACHE_SIZE)
def value_at(expression, trial: int, digits: int) -> tuple | None:
    """(real part, imaginary part) of an expression at a fixed point; None where it has no value."""
    point = sample_point(expression, trial)
    if trial == NEGATIVE:  # For lengths √(a²b) is a√b, so points are skipped where a term is not real.
        for term in expression.atoms(sympy.Pow, sympy.log) | {expression}:
            if not term.evalf(15, subs=point).is_real:
                return None
    value = expression.evalf(digits, subs=point, maxn=2 * digits)
    parts = value.as_real_imag()
    are_numbers = all(isinstance(part, sympy.Float | sympy.Rational) for part in parts)
    return parts if are_numbers else None


def values_at_points(a, b):
    """Yields (value of a, value of b, tolerance) at the points where both have a value."""
    symbols = a.free_symbols | b.free_symbols
    for trial in range(TRIALS if symbols else 1):
        try:
            digits = max(digits_needed(a, trial), digits_needed(b, trial))
            if digits > MAX_DIGITS:
                return
            x = value_at(a, trial, digits)
            y = value_at(b, trial, digits)
        except ERRORS:
            continue
        if x and y:
            yield x, y, sympy.Float(10, 15) ** (50 - digits)


def close(x: tuple, y: tuple, tolerance) -> bool:
    size = max(1, *map(abs, x), *map(abs, y))
    differences = [abs(x[0] - y[0]), abs(x[1] - y[1])]
    return all(difference <= tolerance * size for difference in differences)


def differ_clearly(a, b) -> bool:
    """Whether 50 digits at the first point tell two expressions apart, as they do for most wrong answers."""
    try:
        x = value_at(a, 0, 50)
        y = value_at(b, 0, 50)
    except ERRORS:
        return False
    return bool(x and y) and not close(x, y, sympy.Float(10, 15) ** -20)


def same_number(a, b) -> bool:
    """Whether two expressions are equal: exactly if both are rational, else to at least 200 digits, and at three points or
    more if there are symbols."""
    are_rational = a.is_Rational and b.is_Rational
    if a == b or are_rational or not INFINITE.isdisjoint((a, b)):
        return a == b
    if differ_clearly(a, b):
        return False
    count = 0
    for x, y, tolerance in values_at_points(a, b):
        if not close(x, y, tolerance):
            return False
        count += 1
    symbols = a.free_symbols | b.free_symbols
    return count >= (3 if symbols else 1)


def constant_value(expression):
    """The real value of an expression that has the same value at all points, else None."""
    values = list(values_at_points(expression, expression))
    if len(values) < (3 if expression.free_symbols else 1):
        return None
    first = values[0][0]
    is_constant = all(close(value, first, tolerance) for value, _, tolerance in values)
    return first[0] if is_constant else None


def same_relation(a: Relation, b: Relation) -> bool:
    """2y = 4x + 6 is y − 2x = 3: one difference is a multiple of the other, for < and ≤ a positive one."""
    u, v = a.difference, b.difference
    if a.sign != b.sign or not u.free_symbols or u.free_symbols != v.free_symbols:
        return False
    zero = sympy.Integer(0)
    if same_number(u, zero) or same_number(v, zero):
        return False
    ratio = constant_value(u / v)
    return ratio is not None and (a.sign in "=≠" or bool(ratio > 0))


def same_antiderivative(a, b) -> bool:
    """ln 2x + C is ln x + C: the constant of integration absorbs a number. A sum with another capital letter than C is not
    taken for an antiderivative."""
    symbols = a.free_symbols | b.free_symbols
    names = {symbol.name for symbol in symbols} - {"C"}
    if not names & set("xyztuvs") or any(name[0].isupper() for name in names):
        return False
    return is_plus_constant(a) and is_plus_constant(b) and constant_value(a - b) is not None


def is_plus_constant(expression) -> bool:
    """Whether an expression is a sum of C and of terms without C."""
    constant = sympy.Symbol("C")
    return constant in expression.free_symbols and constant not in (expression - constant).free_symbols


def pieces(numbers: sympy.Set) -> list[tuple]:
    """The intervals of a set of numbers in order, as ((left_open, right_open), start, end)."""
    found = []
    for part in numbers.args if isinstance(numbers, sympy.Union) else [numbers]:
        if isinstance(part, sympy.FiniteSet):
            found += [((False, False), x, x) for x in part]
        else:
            is_open = bool(part.left_open), bool(part.right_open)
            found.append((is_open, part.start, part.end))
    return sorted(found, key=lambda piece: piece[1].evalf(30))


def same_set(a: sympy.Set, b: sympy.Set) -> bool:
    if sympy.EmptySet in (a, b):
        return a == b
    left, right = pieces(a), pieces(b)
    if [piece[0] for piece in left] != [piece[0] for piece in right]:
        return False
    for (_, start, end), (_, other_start, other_end) in zip(left, right, strict=True):
        if not (same_number(start, other_start) and same_number(end, other_end)):
            return False
    return True


def unwrapped(value):
    """A set of one is its element, a column is a tuple, a matrix is its rows, a solution is its numbers."""
    if isinstance(value, Solution):
        return value.numbers
    if isinstance(value, Parts) and value.kind == "set" and len(value.items) == 1:
        return unwrapped(value.items[0])
    if isinstance(value, sympy.MatrixBase):
        if value.cols == 1:
            return Parts("tuple", tuple(value))
        rows = [Parts("row", tuple(row)) for row in value.tolist()]
        return Parts("matrix", tuple(rows))
    return value


def same(a, b) -> bool:
    """Whether two values are equal: lists and sets in any order, everything else part by part."""
    if isinstance(a, Solution) and isinstance(b, Solution):
        return a.symbol == b.symbol and same(a.numbers, b.numbers)
    if isinstance(a, Relation) or isinstance(b, Relation):
        left = a.relation if isinstance(a, Solution) else a
        right = b.relation if isinstance(b, Solution) else b
        both = isinstance(left, Relation) and isinstance(right, Relation)
        return both and same_relation(left, right)
    a, b = unwrapped(a), unwrapped(b)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return same_number(a, b) or same_antiderivative(a, b)
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        a, b = as_set(a), as_set(b)
        return None not in (a, b) and same_set(a, b)
    return isinstance(a, Parts) and isinstance(b, Parts) and same_parts(a, b)


def same_parts(a: Parts, b: Parts) -> bool:
    if len(a.items) != len(b.items):
        return False
    are_lists = {a.kind, b.kind} <= {"list", "set"}
    if not are_lists and a.kind != b.kind:
        return False
    if not are_lists and a.kind != "union":
        return all(map(same, a.items, b.items))
    for item in a.items + b.items:  # Each must be in a as often as in b.
        count = sum(same(item, other) for other in a.items)
        if count == 0 or count != sum(same(item, other) for other in b.items):
            return False
    return True


# -- normalise: one spelling for the same mathematics -----------------------------------------------------------------

# What is one sign in mathematics becomes one character, so that \cosx, \piR and \leqx are read, too (\leq before \le).
SIGNS = r"""\lt < \gt > \leqslant ≤ \leqq ≤ \leq ≤ \le ≤ <= ≤ \geqslant ≥ \geqq ≥ \geq ≥ \ge ≥ >= ≥ \neq ≠ \ne ≠ != ≠
    \infty ∞ \in ∈ \equiv ≡ \approx ≈ \cup ∪ \cap ∩ \setminus ∖ \backslash ∖ \land ∧ \wedge ∧ \lor ∨ \vee ∨ \\ , ; ,
    \cdots … \cdot * \times * × * · * \div / ÷ / ⁄ / − - – - \pi π \pm ± \mp ∓ \emptyset ∅ \varnothing ∅ \sqrt √
    \ldots … \dots … ... … \mid | \vert | \lvert | \rvert | \langle ( \rangle ) \lfloor \floor( \rfloor ) \lceil \ceil(
    \rceil ) \degree ° \circ ° \mathbb{R} (-∞,∞) \dfrac \frac \tfrac \frac \cfrac \frac \dbinom \binom \tbinom \binom
    \colon : \% % \$ $"""
SIGNS = SIGNS.split()
SIGNS = dict(zip(SIGNS[::2], SIGNS[1::2], strict=True))
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {word: str(n) for n, word in enumerate(NUMBERS)}
NUMBERS |= {"infinity": "∞", "all real numbers": "(-∞,∞)"}
MAGNITUDES = {"thousand": "*1000", "million": "*10^6", "degrees": "°", "percent": "%"}
FRACTION = r"\\frac(?: ?\d|\{\d+\}){2}"
BARE_UNIT = r"[mckd]m|kg|m[glL]|[kM]?eV|mph|\\Omega|(?<= )[msghLVNJW]|[a-zA-Z]{4,}(?: [a-zA-Z]+)*"


def both_signs(match: re.Match) -> str:
    plus, minus = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
    return match[0].translate(plus) + "," + match[0].translate(minus)


def repeating_decimal(match: re.Match) -> str:
    before, places, period = match.groups()
    nines = (10 ** len(period) - 1) * 10 ** len(places)
    return rf"({before}0+\frac{{{period}}}{{{nines}}})"


def subscript(match: re.Match) -> str:
    label = match[1].replace(" ", "")
    return f"_{label} " if len(label) == 1 else f"_{{{label}}}"


def without_degrees(match: re.Match) -> str:
    text = re.sub(r"(?<=[\d})])°$", '"degree"', match[0])
    return text.replace("°", "")


def without_spaces(match: re.Match) -> str:
    return re.sub("[, ]", "", match[0])


# (pattern, replacement, example), applied in this order. Afterwards quotes stand around text, $ means dollars, and every
# relation is one character.
REWRITES = [
    # what stands around an answer
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1", "**73** → 73"),
    (r"[\\\s]+$", "", r"73\\ → 73"),
    (r'"|(?<!\\)\$(?!\d[\d.,]*$)|(?<!\\)\\[()\[\]]', "", r"\(5\) → 5"),  # but $5 is money
    (
        r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|math(?:bf|it|cal)|boldsymbol)(?![a-zA-Z])|\\! *",
        "",
        r"\left(5\right) → (5)",
    ),
    (
        r"(?:(?<!\\)\\[,;:> ]|~|\\(?:q?quad|angle|triangle)(?![a-z])|\\(?:begin|end)\{cases\}|\{,\}|\s)+",
        " ",
        r"a\quad\, b → a b",
    ),
    (r"^ ?(?:\\boxed ?\{(.*)|\{([^{}]*))\} ?$", r"\1\2", r"\boxed{5} → 5"),
    # text
    (r"\\(?:mathrm|operatorname) ?\{ ?([ei]) ?\}", r" \1 ", r"7\mathrm{i} → 7 i "),  # a roman constant
    (
        r"\\(?:text(?:bf|it|rm|sf|normal)?|mathrm|mbox|operatorname\*?) ?\{([^{}]*)\}",
        r'"\1"',
        r'5\text{ cm} → 5" cm"',
    ),
    (
        r'(?i)^ ?"? ?(?:(?:the )?answer(?: is)?:?|option|approximately|\\approx) ?"?',
        "",
        r"The answer is 5 → 5",
    ),
    (
        rf'(?i)(?:^|(?<=[=,(\[{{∈+-])) ?"? ?({"|".join(NUMBERS)})[ .]?"?(?= ?[",)}}=]| ?$)',
        lambda match: NUMBERS[match[1].lower()],
        'n ="six" → n =6',  # 2"five" is not 25
    ),
    (r'^"(-?\d[\d.,]*) ?([^"\d]*)"$', r'\1"\2"', '"3 apples" → 3"apples"'),
    (r"(?i)(?<![a-z\\])infinity(?![a-z])", "∞", "2 < infinity → 2 < ∞"),
    (r'(?<=[\d}]) ?" ?min ?"', '"minute"', '5 "min" → 5"minute"'),  # not the function
    (
        rf'(?i)(?<=[\d}})]) ?" ?({"|".join(MAGNITUDES)})[ .]?"',
        lambda match: MAGNITUDES[match[1].lower()],
        '5 "million" → 5*10^6',
    ),
    (
        rf'" ?({FUNCTION}|pi) ?"|(?<![\\a-zA-Z])({FUNCTION}|sqrt|pi|infty)(?![a-zA-Z])',
        r"\\\1\2 ",
        r"sqrt(2) → \sqrt (2)",
    ),
    (r'\(? ?\\?"? ?(?<![a-z])[pb]?mod(?![a-z]) ?"?([^()]*)\)?', r"@\1", r"3 \pmod{7} → 3@{7}"),
    # numbers and signs
    (r"(?<=[\w)}]) ?\*\* ?(?=[\w({-])", "^", "2**3 → 2^3"),
    (
        r"(\d*\.(\d*))\\(?:overline|bar|dot) ?\{?(\d+)\}?",
        repeating_decimal,
        r"0.1\overline{6} → (0.10+\frac{6}{90})",
    ),
    (r"\\not ?=", "≠", r"x \not= 3 → x ≠ 3"),
    (r"\\mathbb ?([A-Z])", r"\\mathbb{\1}", r"\mathbb R → \mathbb{R}"),
    (r"\\\{ *\\\}", "∅", r"\{ \} → ∅"),
    ("|".join(map(re.escape, SIGNS)), lambda match: SIGNS[match[0]], r"x \le 5\pi → x ≤ 5π"),
    (r"_ ?\{([^{}]*)\}", subscript, "b_{2}-A_{ 12 } → b_2 -A_{12}"),
    (r"\\frac ?(\d) (\d)(?!\d)", r"\\frac{\1}{\2}", r"\frac 4 9 → \frac{4}{9}"),
    (r"(?i)(?<=[\d}]) ?percent(?![a-z])", "%", "41.5 percent → 41.5%"),
    (r"(?<=\d) ?([€£¥¢])", r'"\1"', '12.50€ → 12.50"€"'),
    (r'\^ ?\{? ?(?:(°)|"(?:st|nd|rd|th)") ?\}?', lambda match: match[1] or "", "90^{°} → 90°"),
    (r"^((?!\\(?:sin|cos|tan)).)*$", without_degrees, '90° → 90"degree"'),  # outside of functions ° is a unit
    (r'(?:, ?)?"? ?(?<![\\a-zA-Z])and(?![a-zA-Z]) ?"?', "∧", "1, 2, and 3 → 1, 2∧3"),
    (r'(?:, ?)?"? ?(?<![\\a-zA-Z])or(?![a-zA-Z]) ?"?', "∨", '1" or "2 → 1∨2'),
    # remove the name of what is stated: of a member, an approximation, a class, a point, a function, a set
    (rf"^ ?{VARIABLE} ?[∈≈≡]", "", r"x ∈ {1, 2} →  {1, 2}"),
    (r", ?[j-n] ?∈ ?(?:\\mathbb ?\{?)?[NZ]\}? ?$", "", r"2πk, k ∈ \mathbb{Z} → 2πk"),
    (r"^ ?[A-Z] ?(?=\(.*,.*\) ?$)", "", "A(1,2) → (1,2)"),
    (r"^ ?[a-zA-Z] ?\([a-z]\) ?=(?!.*=)(?! ?[a-eA-E] ?$)", "", "f(x) = 2x+1 →  2x+1"),
    (r", ?[a-z] ?∈ ?\(-∞,∞\)$", "", "2x, x ∈ (-∞,∞) → 2x"),
    (
        r"^\\\{ ?([a-z]) ?(?:∈ ?\(-∞,∞\) ?)?[|:](?=[^<>≤≥=]*[<>≤≥=])(?=.*\1)(.*)\\\}$",
        r"\2",
        r"\{x | x > 2\} →  x > 2",
    ),
    (r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?= \d+/\d)", without_spaces, "1 000 4/9 → 1000 4/9"),
    (
        rf"(?<![\d.^_])(\d+)(?: ?({FRACTION})| (\d+/\d+))(?!\d)",
        r"{\1+\2\3}",
        r"3\frac{1}{2} → {3+\frac{1}{2}}",
    ),
    (r"\\(sin|cos|tan|cot) ?\^ ?\{?-1\}?", r"\\arc\1 ", r"\tan^{-1}(1) → \arctan (1)"),
    (r"^([^≈]*)≈([^≈]*)$", r"\2=\1", "π ≈ 3.14 →  3.14=π "),  # The last part, the exact one, counts.
    (r"\|([^|]*)\|", r"\\abs(\1)", r"|-5| → \abs(-5)"),
    (
        r"(?:^|(?<=[,∧∨])|(?<=\\\{))(?:[^,∧∨\\]|\\[^{}])*[±∓](?:[^,∧∨\\]|\\[^{}])*",
        both_signs,
        "3 ± √2 → 3 + √2,3 - √2",
    ),
    (
        r'^\(?"?([\dA-F]*\d[\dA-F]*)"?\)? ?_\{?(-?\d+)\}? ?$',
        r"\1_{\2}",
        "(112)_3 → 112_{3}",
    ),  # digits in a base
    (rf"(?<=[\d}}]) ?({BARE_UNIT})(?=\^|[ ,;)%]|$)", r'"\1"', '10 cm → 10"cm"'),
    (r"^\(([a-zA-Z]), ?([a-zA-Z])\) ?= ?\(([^,()]*),([^,()]*)\)$", r"\1=\3,\2=\4", "(x,y) = (1,2) → x=1,y=2"),
    (
        r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]|\.\d*,| \d|.*(?:[)\]]|\\\}))",
        without_spaces,
        "12,345 → 12345",
    ),
]


@functools.lru_cache(CACHE_SIZE)
def normalise(text: str) -> str:
    """Returns one spelling: no delimiters, boxes or sizes, text in double quotes, single spaces. Raises ValueError where
    the text is too long or has two boxed answers."""
    brackets = max(map(text.count, "([{"))
    if len(text) > MAX_CHARS or brackets > MAX_BRACKETS or text.count("\\boxed") > 1:
        raise ValueError("too long, or two answers")
    text = re.sub("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}", text)
    text = re.sub("([¼-¾⅐-⅞])", r" \1", text)
    text = unicodedata.normalize("NFKC", text).strip()
    for pattern, replacement, _ in REWRITES:
        text = re.sub(pattern, replacement, text)
    return re.sub(" +", " ", text).strip()


# -- equal: units, names, percent and rounding -------------------------------------------------------------------------


def read_units() -> dict[str, str]:
    """units.txt as {spelling: unit}."""
    units = {sign: sign for sign in "^*/-123"}
    for line in Path(__file__).with_name("units.txt").read_text().splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["="]:
            units |= {word: word for word in words[1:]}
        else:
            units |= {word: words[0] for word in words}
    return units


UNITS = read_units()
# Units after normalise: text in quotes, its powers, and the signs that join two such texts, as in "m"/"s"^2.
UNIT_TEXT = r'(?:"(?:[^"\d]|\^[{-]*\d)*"(?:\^[{-]*\d\}?)?[ */]*)*'


def known_unit(word: str) -> str | None:
    """The unit of a word, which may have a plural's s and, if it is longer than one letter, capitals."""
    lower = word.lower() if len(word) > 1 else word
    for form in (word, lower, lower.removesuffix("s")):
        if form in UNITS:
            return UNITS[form]
    return None


@functools.lru_cache(CACHE_SIZE)
def split_unit(text: str) -> tuple[str, str, bool]:
    """Returns an answer without its unit, the unit in one spelling (square centimeters → cm^2), and whether it is known."""
    match = re.fullmatch(rf'([$€£]?)(.*?[^" ]) *({UNIT_TEXT})', text)
    if not match:
        return text, "", True
    currency, value, unit = match.groups()
    unit = currency + unit.replace(" per ", "/")
    unit = re.sub(r"(?:square|sq\.?) (\w+)", r"\1^2", unit)
    unit = re.sub(r"cubic (\w+)", r"\1^3", unit)
    words = re.findall(r"\\?[^\W\d]+|\d+|[^\w\s\"{}.]", unit)
    names = [known_unit(word) for word in words]
    if "unit" in names:
        return value, "", True
    unit = "".join(name or word.lower() for name, word in zip(names, words, strict=True))
    return value, unit, None not in names


# Words that may stand before "=" as the name of the sought quantity; any other words there are a remark.
SOUGHT = """the a of is total answer solution result value number sum difference product quotient ratio rate probability
    chance area perimeter circumference volume surface length width height depth radius diameter distance speed velocity
    time age angle slope side base weight mass cost price profit mean median mode average range variance maximum minimum
    max min lim remainder"""
SOUGHT = set(SOUGHT.split())
# gcd and lcm are left out, because an equation with them is often a condition: gcd(m,n) = 1.
COMMANDS = set(re.findall("[a-zA-Z]{2,}", NAME + FUNCTION)) - {"gcd", "lcm"} | {"frac", "deg"}


def is_name(text: str) -> bool:
    """Whether something may have this name: AB, S_{ABC}, f(x, y), \\frac{TM}{MK}, "the area", but not "surely not" y."""
    text = re.sub(r"_(?:\{[^{}]*\}|\w)", "", text.strip())  # a subscript is a label
    text = re.sub(r"^([fghpqFGHP]'*)(?:\^\{-1\})? ?\((?:-?\d+|[a-z])\)$", r"\1", text)  # f(2), f^{-1}(x)
    commands = re.findall(r"\\([a-zA-Z]+)", text)
    text = re.sub(r"\\[a-zA-Z]+", "", text)
    quoted = " ".join(re.findall(r'"([^"]*)"', text)).lower()
    bare = re.sub(r'"[^"]*"', "", text)
    if re.search(r"[^a-zA-Z(){}, ':]", bare) or re.search("[^a-z .]", quoted):
        return False
    words = re.findall("[a-z]+", quoted)
    symbols = [run for run in re.findall("[a-zA-Z]+", bare) if run.lower() not in SOUGHT]
    # One symbol, a pair without the letters i and o (no, is, or, if, of), or points (ABC).
    are_symbols = all(re.fullmatch(r"[a-zA-Z]|[a-hj-np-zA-Z]{2}|[A-Z]{2,6}", run) for run in symbols)
    are_side_by_side = len(symbols) > 1 and re.search("[a-zA-Z]{2,} +[a-zA-Z]", bare)
    are_sought = all(len(word) == 1 or word in SOUGHT for word in words)
    is_empty = not (words or commands or re.search("[a-zA-Z]", bare))
    if are_side_by_side or is_empty:
        return False
    return are_symbols and are_sought and COMMANDS.issuperset(commands)


def symbols_in(text: str) -> set[str]:
    """The symbols of an expression, without the letters of commands and of words."""
    text = re.sub(rf'\\(?:frac|binom|{FUNCTION})|"[^"]*"', " ", text)
    return set(re.findall(NAME, text))


def is_defined(name: str, value: str) -> bool:
    """Whether name = value defines the name; x = 2x + 1 does not."""
    head = re.sub(r"\([^()]*\)", "", name)  # f of f(x) = x^2
    return is_name(name) and symbols_in(head).isdisjoint(symbols_in(value))


@functools.lru_cache(CACHE_SIZE)
def stated(text: str) -> str:
    """What an equation states: 5 of x = y = 5, x^2 of f(x) = x^2, 1023 of 2^{10} − 1 = 1023."""
    *names, value = text.split("=")
    others = [name for name in names if not is_defined(name, value)]
    if any(other.strip() == value.strip() for other in others):  # x = x
        return text
    return value if all(equal(value, other) for other in others) else text


@functools.lru_cache(CACHE_SIZE)
def all_stated(text: str) -> str:
    """What each equation of a list states."""
    if re.search(r"[(\[]|begin", text):
        return stated(text)
    return "".join(part if part in ",∧∨" else stated(part) for part in re.split("([,∧∨])", text))


def percent_number(text: str):
    """The number 50 for the text 50%; None for 5 + 3%."""
    number = read(text.removesuffix("%"))
    if not text.endswith("%") or not isinstance(number, sympy.Expr):
        return None
    return number if read(text) == number / 100 else None


def is_rounding(decimal: str, value) -> bool:
    """Whether the decimal is the value rounded: 0.33 is 1/3 rounded. A value that is a finite decimal itself is never
    rounded: 0.5 does not stand for 0.54."""
    match = re.fullmatch(r" ?-?(?:\d*\.(\d\d+)|\d\d+\.(\d)) ?", decimal)
    if not match or value.free_symbols:
        return False
    if value.is_Rational and pow(10, value.q.bit_length(), value.q) == 0:
        return False
    places = len(match[1] or match[2])
    value = value.evalf(50)
    error = abs(value - sympy.Rational(decimal.strip()))
    return value.is_real is True and bool(error * 2 * 10**places <= 1)


def equal(a: str, b: str) -> bool:
    """Whether normalised `a` is right where normalised `b` is the reference."""
    names = re.findall(r"(?<![^,∧∨]) ?([a-zA-Z]) ?=", f"{a},{b}")
    if ("=" in a) != ("=" in b):
        a, b = all_stated(a), all_stated(b)
    if len(names) > 1 and names == sorted(set(names)):  # x=1,y=2 is (1,2): names in alphabetical order
        a, b = f"({a})", f"({b})"
    a, unit_a, is_known_a = split_unit(a)
    b, unit_b, is_known_b = split_unit(b)
    may_be_left_out = is_known_a and is_known_b and "" in (unit_a, unit_b)
    if unit_a != unit_b and not may_be_left_out:
        return False
    x, y = read(a), read(b)
    if x is None or y is None:
        raise ValueError("not read")
    if same(x, y):
        return True
    if not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return False
    if ("%" in a) != ("%" in b):  # 50% is 0.5 and also 50
        x, y = (percent_number(a), y) if "%" in a else (x, percent_number(b))
        return None not in (x, y) and same(x, y)
    return is_rounding(b, x)


# -- the verdict -------------------------------------------------------------------------------------------------------

CHOICE = re.compile(r'"?\(?([A-E])(?:[).:]+(?!"? *(?:,|\([A-E]\)))"? *(.*)|"?)', re.IGNORECASE)
BESIDE = r"(?i)\b[a-e]\b|[∧∨]|,(?![^(\[]*[)\]])"  # another letter, or an alternative outside of brackets
# Words rather than a product of letters: with quotes, or four letters in a row, or three of which the first is a capital.
WORDS = re.compile(r"""(?=.*("|[A-Za-z]{4}|[A-Z][A-Za-z]{2}))["A-Za-z .'-]+""")
LETTERS = re.compile(r"""[ "]*\(?[ "]*[A-Za-z](?:["A-Za-z .']|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2}))*\)?[ ".]*""")
BASE_OR_TIME = re.compile(r"[\dA-F]+_\{-?\d+\}|\d?\d:[0-5]\d")  # read as they are written


def same_words(a: str, b: str) -> bool:
    """Words are compared with words, never with the letters of an expression: -y and \\text{y} differ."""
    if not (LETTERS.fullmatch(a) and LETTERS.fullmatch(b)):
        return False
    letters = [re.sub("[^a-z]", "", text.lower()) for text in (a, b)]
    return letters[0] == letters[1]


def same_choice(answer: str, option: re.Match, choices: dict[str, str]) -> bool:
    """Whether the answer gives the option's letter, alone or with its content, or only the content if `choices` has it.

    If neither `choices` nor the reference gives the content, any text after the letter will do that names no other option.
    """
    letter = option[1]
    chosen = CHOICE.fullmatch(normalise(answer))
    if choices and not chosen:  # the content of this letter, and of no other
        letters = [key for key, content in choices.items() if is_equal(answer, content)]
        return letters == [letter]
    if not chosen or chosen[1].upper() != letter:
        return False
    content = choices.get(letter, option[2]) or re.sub(BESIDE, "", chosen[2] or "")
    return not chosen[2] or is_equal(chosen[2], content)


@functools.lru_cache(CACHE_SIZE)
def without_punctuation(text: str) -> str:
    """The text without spaces, full stops and quotes, except for those between digits: 1 2 is not 12."""
    return re.sub(r'(?<![\d ."])[ ."]+|[ ."]+(?![\d ."])', "", text)


def decide(answer: str, reference: str, choices: dict[str, str] | None = None) -> tuple[bool, str]:
    """Returns the verdict, and how it was reached: by_number, by_string, by_value, or refused. Never raises."""
    answer, reference = answer.strip(), reference.strip()
    if re.fullmatch(r"0|-?[1-9]\d*", answer) and re.fullmatch(r"0|-?[1-9]\d*", reference):
        return answer == reference, "by_number"
    if answer == reference:
        return answer != "", "by_string"
    try:
        a, b = normalise(answer), normalise(reference)
        if without_punctuation(a) == without_punctuation(b) != "":
            return True, "by_string"
        option = CHOICE.fullmatch(b)
        if option and option[1].isupper():
            return same_choice(answer, option, choices or {}), "by_string"
        if WORDS.fullmatch(a) or WORDS.fullmatch(b):
            return same_words(a, b), "by_string"
        return equal(a, b), "by_value"
    except ERRORS:
        return answer == reference != "", "refused"


def is_equal(answer: str, reference: str, choices: dict[str, str] | None = None) -> bool:
    """Whether a careful human grader would accept `answer` for `reference`. Deterministic, never raises."""
    return decide(answer, reference, choices)[0]


@functools.lru_cache(CACHE_SIZE)
def how_read(text: str) -> str:
    """How a text can be read as an answer: "choice", "words", "value", or "" where it cannot."""
    try:
        text = normalise(text)
        if CHOICE.fullmatch(text):
            return "choice"
        if WORDS.fullmatch(text):
            return "words" if LETTERS.fullmatch(text) else ""
        if BASE_OR_TIME.fullmatch(text):
            return "value"
        text = all_stated(text)
        _, _, is_known_unit = split_unit(text)
        return "value" if is_known_unit and equal(text, text) else ""
    except ERRORS:
        return ""
