"""The reward: extract the answer of a response, decide if it equals the reference, in limited processes.

In:   the text of a response, the reference answer, the reason why generation ended.
Out:  1.0 or 0.0 (ORZ's rule: 1.0 only if generation ended by itself and the boxed answer is right).

    extract_answer → normalise (one spelling) → equal (equations, intervals, units) → Evaluator (values at points)
    → agree (part by part) → decide → grade → Grader

Two answers are equal if they have the same value: constants to thousands of digits, expressions at fixed points.
Nothing of an answer is ever run as code: the Evaluator computes while it reads. Why not sympy: of 2,160 different
real references its parse_latex reads 2,070, latex2sympy2_extended 2,143 and this 2,157, at a sixth of the median
time or less; both compute while they parse, without bounds. math-verify is right on 80% of tests/reward_pairs.py
(which specify this grader, so that its own 99% there says less). All of it is measured by bench/reward.py.

This file knows nothing of the others. `python reward.py` is one process of the Grader's pool.
"""

import ctypes
import json
import math
import operator
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from concurrent.futures import Future
from functools import lru_cache

from mpmath.ctx_mp import MPContext

CPU_SECONDS = 2.0  # of a grading process per item: independent of how busy the machine is
WALL_SECONDS = 30.0  # backstop against a process that neither works nor ends; 0 such items in a healthy run
MEMORY_BYTES = 1 << 30  # address space of one grading process

# Work is refused before it starts where it is larger than any of 5,238 real references needs.
MAX_CHARS, MAX_DEPTH = 1000, 60
MAX_BITS = 1 << 17  # of a power: 2013^2014 has 22,000
MAX_WHOLE = 20000  # n of n! and of binomials
# Bits of a number: in expressions with variables, in constants, and in constants made of integers alone, where
# arithmetic is thus exact far beyond 2013^2014.
BITS, BITS_OF_CONSTANTS, BITS_OF_INTEGERS = 1 << 10, 1 << 12, 1 << 15
MP = MPContext()  # of our own: mpmath's global precision is left alone
MP.prec = BITS_OF_CONSTANTS
TINY = MP.ldexp(1, -900)


def extract_answer(response: str) -> str:
    """Content of the last `\\boxed{…}` inside the last complete `<answer> … </answer>`, "" if none."""
    start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
    if start < 0:
        return ""
    block = response[start : response.find("</answer>", start)]
    answer, opened = "", []  # one pass with a stack: linear however the braces are nested
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", block, re.DOTALL):
        if token[0] == "}":
            begin = opened.pop() if opened else None
            answer = answer if begin is None else block[begin : token.start()]
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(None if token[0] == "{" else token.end())
    return answer


# -- normalise: one spelling for the same mathematics -----------------------------------------------------------

FUNCTIONS = "arcsin|arccos|arctan|arccot|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|lg|exp|gcd|min|max|abs|floor|ceil"
NAME = r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\{[^{}]*\}|\w))?'*"
BARE = r"(?<![\\a-zA-Z])(?:{})(?![a-zA-Z])"
PLAIN_LATEX = r"- - / ° \cdot \times \pi \infty \cup \cap \pm \mp \emptyset \R \theta".split()
SPELLINGS = {
    ord(char): latex + " " * (latex > "A") for char, latex in zip("−–÷º·×π∞∪∩±∓∅ℝθ", PLAIN_LATEX, strict=True)
}
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
MAGNITUDES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
UNIT = r" ?(?:[mckd]m|kg|m[glL]|[kM]?eV|Hz|mph)| (?:[msghLVNJW]|[a-zA-Z]{4,}(?: [a-zA-Z]+)*)"


def both_signs(match: re.Match) -> str:
    """3 ± √2 → 3 + √2, 3 − √2."""
    return ",".join(match[0].replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in ("+-", "-+"))


# In this order. Afterwards "…" is text, ° the degree, $ the dollar, and relations are one character.
REWRITES = [
    (r"√ ?(\d+)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("−", "-") + "}"),
    (r"[¼-¾⅐-⅞]", lambda m: r" \frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    (r'"|(?<!\\)\$(?!\d[\d.,]*$)|(?<!\\)\\[()\[\]]', ""),  # math delimiters, but "$5" is money
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])|,?\\!\s*(?=\d{3})|\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])|\s+", " "),
    (r"\{,\}", ","),
    (r"^ ?\\boxed ?\{(.*)\} ?$", r"\1"),
    (r"\\boxed ?(?=\{)", ""),
    (r"^ +| +$", ""),
    (r"\\math(?:bb|bf|rm) ?\{?R\}?(?![a-z])", r"\\R "),
    (r"\\(?:math(?:bf|it|cal|sf)|boldsymbol|bm) ?(?=\{)", ""),
    (r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mbox|operatorname\*?) ?\{([^{}]*)\}", r'"\1"'),
    (rf'" ?({FUNCTIONS}|pi) ?"|(?<![\\a-zA-Z])({FUNCTIONS}|sqrt|pi|infty)(?![a-zA-Z])', r"\\\1\2 "),
    (BARE.format("and|or") + r"|\\lor(?![a-z])|\\vee(?![a-z])", ","),
    (r'" ?, ?"|, ?,', ","),
    (r'" ?(/|\\cdot) ?"', r"\1"),
    (r'^" ?(?:(?:[tT]he )?[aA]nswer(?: is)?:?|[oO]ption|approximately) ?("?)(?=.)', r'"\1'),
    (r'^""', ""),
    (r"^(?:[tT]he )?[aA]nswer(?: is)?:? |^ ?\\approx", ""),
    (rf'(?i)^"? ?({"|".join(WORDS)}) ?"?$', lambda m: str(WORDS.index(m[1].lower()))),
    (r'^"?all real numbers"?$', r"\\R "),
    (r'^(-?) ?"?infinity"?$', r"\1\\infty "),
    (r'(?<=\d)(?:"| ?\^ ?\{? ?")(?:st|nd|rd|th)" ?\}?', ""),
    (r", ?[a-z] ?\\in ?\\math(?:bb|bf) ?\{?[ZN].*$", ""),  # for all integers k
    (r"^ ?[fgh] ?\([a-z]\) ?=", "y="),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\([%$])", r"\1"),
    (r'\^ ?\{? ?\\circ ?\}?|\\degree|" ?degrees? ?"|' + BARE.format("degrees?"), "°"),
    (r"\\leqslant|\\leq|\\le|<=", "≤"),
    (r"\\geqslant|\\geq|\\ge|>=", "≥"),
    (r"\\neq|\\ne|!=", "≠"),
    (r"\\in(?!f|t)", "∈"),
    (r"\\approx", "≈"),
    (r"\\[lr]?vert", "|"),
    (r"^.*(?:\\equiv|≡)", ""),  # of x ≡ 3 (mod 7) the class
    (r'\( ?\\?"? ?[pb]?mod ?"?([^()]*)\)|\\[pb]?mod|" ?mod ?"|(?<= )mod(?= )', r"\\mod \1 "),
    *((rf'" ?{word} ?"', rf"\\cdot {factor} ") for word, factor in MAGNITUDES.items()),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(frac|sqrt|binom) ?(\d|[a-zA-Z]|\\pi(?![a-z]))", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\}) ?(\d|[a-zA-Z])", r"\1{\2}"),
    (r"(?<![\d.^_])(\d+) ?(\\frac\{\d+\}\{\d+\})", r"{\1+\2}"),  # a mixed number
    (r"(?<![\d.^_])(\d+) (\d+)/(\d+)(?!\d)", r"{\1+\\frac{\2}{\3}}"),
    (r"^([^{}]*)\\over([^{}]*)$|\{([^{}]*)\\over([^{}]*)\}", r"\\frac{\1\3}{\2\4}"),
    (r"\\l(floor|ceil)", r"\\\1("),
    (r"\\r(?:floor|ceil)", ")"),
    (r"\\[lc]?dots|\.\.\.", r"\\ldots "),
    (r"\\begin\{(?:[pbBs]|small)?(?:matrix|array)\}(?:\{[clr| ]*\})?", r"\\begin "),
    (r"(?:\\\\)? *\\end\{\w+\}", r"\\end "),
    (r"^\\\{ ?[a-zA-Z] ?(?:∈ ?\\R ?)?(?:\\mid|\||:)(?=.*[<>≤≥≠])(.*)\\\}$", r"\1"),  # {x | condition}
    (rf"^ ?{NAME} ?∈", ""),
    (rf"^ ?{NAME} ?≠(.*)$|^\\R *\\setminus *\\\{{([^,]*)\\\}}$", r"(-\\infty ,\1\2)\\cup (\1\2,\\infty )"),
    (rf"^ ?\|({NAME})\| ?([<≤])(.*)$", r"-(\3)\2\1\2\3"),
    (r"\|([^|]*)\|", r"\\abs(\1)"),
    (r"^[A-Z] ?(?=\(.*,.*\)$)", ""),  # a named point
    (r"(?:^|(?<=,)|(?<=\\\{))(?:[^,\\]|\\[^{}])*\\(?:pm|mp)(?:[^,\\]|\\[^{}])*", both_signs),
    (r"^ ?\{([^{}]*)\} ?$", r"\1"),
    (rf"(?<=[\d}}])({UNIT})(?=(?:\^\{{?\d\}}?)? ?(?:[,;)%]|$))", r'"\1"'),  # a bare unit is text, too
    (r"^[ ,;:]+|[ ,;:.]+$|(?:\\\\)+$", ""),
]
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]


@lru_cache(maxsize=4096)  # 64 samples share a reference
def normalise(text: str) -> str:
    """One spelling: no delimiters, boxes or sizes, text in double quotes, single spaces."""
    controls = any(unicodedata.category(c) in ("Cc", "Cf") for c in text if c not in "\n\t\r")
    if controls or len(text) > MAX_CHARS or text.count("\\boxed") > 1:
        raise ValueError("too long, with control characters, or two answers")
    text = text.strip().translate(SPELLINGS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return re.sub(" +", " ", unicodedata.normalize("NFKC", text)).strip()


# -- Evaluator: the value of an answer at a point ----------------------------------------------------------------


def power(x, y):
    """x^y, where odd roots of negative numbers are real."""
    if x != 0 and abs(y * MP.mag(x)) > MAX_BITS:
        raise ValueError("too large a power")
    if (
        MP.isint(x)
        and MP.isint(y)
        or MP.im(x) != 0
        or MP.re(x) >= 0
        or y == 0
        or not close(1 / y, MP.nint(1 / y))
    ):
        return MP.power(x, y)
    return -MP.power(-x, y) if int(MP.nint(1 / y)) % 2 else MP.power(x, y)


def whole(apply):
    """A function of natural numbers that are not too large."""

    def checked(*values):
        if any(value != MP.nint(value) or not 0 <= value <= MAX_WHOLE for value in values):
            raise ValueError("not a small natural number")
        return MP.mpf(apply(*(int(value) for value in values)))

    return checked


def join(kind):
    """The operator that makes one flat structure: 1, 2, 3 → ("list", [1, 2, 3])."""
    return lambda a, b: (kind, [*(a[1] if type(a) is tuple and a[0] == kind else [a]), b])


PRODUCT = 8
# Operators and how tightly they bind.
BINARY = {r"\\": (0, join("rows")), "&": (1, join("row")), ",": (2, join("list")), ";": (2, join("list"))}
BINARY |= {sign: (3, join(sign)) for sign in ("=", "<", "≤", r"\parallel", r"\perp")}
BINARY |= {">": (3, lambda a, b: ("<", [b, a])), "≥": (3, lambda a, b: ("≤", [b, a]))}
BINARY |= {r"\cup": (4, join("union")), r"\mod": (5, join("mod")), ":": (6, join("ratio"))}
BINARY |= {"+": (7, operator.add), "-": (7, operator.sub)}
BINARY |= dict.fromkeys(("*", r"\cdot", r"\times"), (PRODUCT, operator.mul))
BINARY |= dict.fromkeys(("/", r"\div"), (PRODUCT, operator.truediv))
POSTFIX = {"!": whole(math.factorial), "!!": whole(lambda n: math.prod(range(n, 0, -2)))}
POSTFIX |= {"%": lambda x: x / 100, "°": lambda x: x}
TRIGONOMETRIC = "sin", "cos", "tan", "cot", "sec", "csc"
CALLS = {name: getattr(MP, name) for name in (*TRIGONOMETRIC, "sinh", "cosh", "tanh", "ln", "exp")}
CALLS |= {"arc" + name: getattr(MP, "a" + name) for name in TRIGONOMETRIC[:4]}
CALLS |= {"log": MP.ln, "lg": MP.log10, "abs": abs, "min": min, "max": max, "gcd": whole(math.gcd)}
CALLS |= {"floor": lambda x: MP.floor(x + TINY), "ceil": lambda x: MP.ceil(x - TINY)}
BUILDERS = "frac", "sqrt", "binom"
CONSTANTS = {"i": MP.mpc(0, 1), "e": +MP.e, r"\pi": +MP.pi, r"\infty": MP.inf, r"\emptyset": ("set", [])}
CONSTANTS |= {r"\varnothing": ("set", []), r"\R": ("()", [-MP.inf, MP.inf])}
OPENERS = "(", "[", "{", r"\{", r"\langle", r"\begin"
BRACKETS = "()", "[]", "[)", "(]", "{}", r"\{\}", r"\langle\rangle", r"\begin\end"
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:\\(?:overline|bar|dot) ?\{?\d+\}?|[eE][+-]?\d{1,4}(?![a-zA-Z\d]))?"
COMMANDS = ["\\" + name for name in ("}", "rangle", "end", *CALLS, *BUILDERS)]
RESERVED = {*BINARY, *CONSTANTS, *OPENERS, *COMMANDS}
# In \cosx the command is the longest that is known; an unknown one is a symbol.
KNOWN = sorted((re.escape(name) for name in RESERVED if name[0] == "\\"), key=len, reverse=True)
TOKEN = re.compile(rf"{NUMBER}|{'|'.join(KNOWN)}|{NAME}|!!|\S")


def number(token: str):
    """A decimal, scientific or repeating literal."""
    head, _, period = token.partition("\\")
    mantissa, _, exponent = head.lower().partition("e")
    whole_part, _, decimals = mantissa.partition(".")
    period = re.sub(r"\D", "", period) or "0"
    value = int(whole_part + decimals) + MP.mpf(int(period)) / (10 ** len(period) - 1)
    return value * MP.mpf(10) ** (int(exponent or 0) - len(decimals))


class Evaluator:
    """Computes a normalised answer at a point (a value for each symbol) while it reads: precedence climbing.

    A value is a number, or (kind, [values]): list, set, tuple by its brackets, union, rows, ratio, relation.
    """

    def __init__(self, text: str, point: dict, real: bool = False):
        self.real = real
        self.tokens = [*TOKEN.findall(text), ""]
        self.point = CONSTANTS | point
        self.at = self.depth = 0

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def value(self):
        """The value of the whole text."""
        result = self.expression()
        if self.tokens[self.at]:
            raise ValueError("unreadable: " + self.tokens[self.at])
        return result

    def expression(self, level: int = 0, in_function: bool = False):
        """Operands and the operators between them that bind at least as tightly as `level`."""
        left = self.operand()
        while True:
            token = self.tokens[self.at]
            if token in BINARY and BINARY[token][0] >= level and not in_function:
                self.at += 1
                left = BINARY[token][1](left, self.expression(BINARY[token][0] + 1))
            elif level <= PRODUCT and self.starts_factor(in_function):
                left = left * self.operand()
            else:
                return left

    def starts_factor(self, in_function: bool) -> bool:
        """Whether a product goes on without a sign. Not between two numbers; sin 2x cos x is (sin 2x)(cos x)."""
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        if in_function and (token in ("(", "[", r"\{") or token[1:] in CALLS):
            return False
        if token[:1].isdigit():
            return not before[-1].isdigit()
        return token in OPENERS or token in self.point or token[1:] in (*CALLS, *BUILDERS)

    def operand(self):
        """A signed atom with its exponent, factorial, …"""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        if self.tokens[self.at] in ("-", "+"):
            result = self.operand() if self.take() == "+" else -self.operand()
        else:
            result = self.atom()
        while self.tokens[self.at] == "^" or self.tokens[self.at] in POSTFIX:
            token = self.take()
            result = power(result, self.operand()) if token == "^" else POSTFIX[token](result)
        self.depth -= 1
        if self.real and type(result) is not tuple and MP.im(result) != 0:
            raise ZeroDivisionError("not a real number here")
        return result

    def atom(self):
        """A number, symbol, bracket, fraction, root or function."""
        token = self.take()
        if token in self.point:
            return self.point[token]
        if token in OPENERS:
            inner = ("list", []) if self.tokens[self.at] == r"\}" else self.expression()
            return bracketed(token + self.take(), inner)
        if token == r"\frac":
            return self.atom() / self.atom()
        if token == r"\binom":
            return whole(math.comb)(self.atom(), self.atom())
        if token == r"\sqrt":
            index = self.atom() if self.tokens[self.at] == "[" else 2
            return power(self.atom(), MP.one / index)
        return self.function(token[1:]) if token[1:] in CALLS else number(token)

    def function(self, name: str):
        """\\sin^2 2x, \\log_2 (x+1): without brackets the argument is a product up to the next function."""
        base = exponent = None
        while self.tokens[self.at] in ("_", "^"):
            if self.take() == "_":
                base = self.atom()
            else:
                exponent = self.operand()
        begin = self.at
        argument = self.atom() if self.tokens[begin] in OPENERS[:3] else self.expression(PRODUCT, True)
        arguments = argument[1] if type(argument) is tuple else [argument]
        if name in TRIGONOMETRIC and "°" in self.tokens[begin : self.at]:
            arguments = [argument * MP.pi / 180]
        if name in (*TRIGONOMETRIC, "exp", "sinh", "cosh", "tanh") and MP.mag(arguments[0]) > 16:
            raise ValueError("too large")
        if exponent == -1 and "arc" + name in CALLS:
            name, exponent = "arc" + name, None
        result = CALLS[name](*arguments)
        result = result if base is None else result / CALLS[name](base)
        return result if exponent is None else power(result, exponent)


def bracketed(brackets: str, inner):
    """A tuple, a set, an interval, or just what is in parentheses."""
    is_list = type(inner) is tuple and inner[0] == "list"
    if brackets not in BRACKETS or brackets in ("[)", "(]") and not is_list:
        raise ValueError("brackets")
    if brackets == r"\{\}" or brackets == "{}" and is_list:
        return "set", inner[1] if is_list else [inner]
    return (brackets, inner[1]) if is_list else inner


def values_at_points(a: str, b: str) -> list[tuple]:
    """Pairs of values at fixed points: j, k … n positive integers, other symbols fractions, once negative."""
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{4}", a + " " + b):
        raise ValueError("words are not products of letters")
    symbols = sorted({token for token in TOKEN.findall(a + b) if re.fullmatch(NAME, token)} - RESERVED)
    of_integers = not re.search(r"[a-zA-Z]", re.sub(r"\\(frac|cdot|times|binom)", "", a + b))
    MP.prec = BITS if symbols else BITS_OF_INTEGERS if of_integers else BITS_OF_CONSTANTS
    pairs = []
    for trial in range(5 if symbols else 1):
        point = {}
        for rank, name in enumerate(symbols):
            # In general position: in a regular grid x + y would be x_1 + x_2.
            scattered = (7919 * (rank + 1) ** 3 + 104729 * (trial + 2) ** 2) % 9973
            point[name] = MP.mpf(scattered + 500) / (1000 if trial < 4 else -1000)
            if name[0] in "jklmnN":
                point[name] = MP.mpf(2 + scattered % 11)
        try:
            # √(a²b) is a√b for lengths: nothing complex where they are negative.
            pairs.append(tuple(Evaluator(text, point, trial == 4).value() for text in (a, b)))
        except ZeroDivisionError:
            continue
    if len(pairs) < (3 if symbols else 1):
        raise ValueError("hardly defined anywhere")
    return pairs


# -- equal: the same value, part by part --------------------------------------------------------------------------


def close(x, y) -> bool:
    """Equal to the precision of the numbers."""
    if MP.isinf(x) or MP.isinf(y):
        return x == y
    size = max(abs(x), abs(y), 1)
    if MP.prec > BITS and not MP.mag(size) < MP.prec - 100:
        raise ValueError("too large to tell it from its neighbours")
    return abs(x - y) <= MP.ldexp(size, 100 - MP.prec)


ALIKE = {"list", "set"}, {"list", "()"}, {"()", "rows", r"\langle\rangle"}  # a vector, in a row or a column


def agree(a, b) -> bool:
    """Whether two values are the same: lists, sets and unions in any order, everything else in order."""
    if type(a) is not tuple and type(b) is not tuple:
        return close(a, b)
    if type(a) is not tuple or type(b) is not tuple:
        (kind, items), other = (a, b) if type(a) is tuple else (b, a)
        if kind == "ratio" and len(items) == 2:
            return agree(items[0] / items[1], other)
        return kind == "set" and len(items) == 1 and agree(items[0], other)
    kinds, items, others = {a[0], b[0]}, a[1], b[1]
    if len(items) != len(others) or len(kinds) > 1 and not any(kinds <= alike for alike in ALIKE):
        return False
    if kinds == {"list", "()"} and len(items) < 3:
        return False  # a pair in parentheses is a point or an interval
    if kinds == {"mod"}:
        steps = (items[0] - others[0]) / others[1]
        return close(items[1], others[1]) and close(steps, MP.nint(steps))
    if kinds == {"ratio"} and (
        len(items) > 2 or not any(10 <= x[1] < 60 for x in (items, others))
    ):  # not 11:50
        return all(close(x * others[0], items[0] * y) for x, y in zip(items, others, strict=True))
    if kinds <= {"list", "set", "union"}:
        left = list(others)
        for item in items:
            match = next((at for at, other in enumerate(left) if agree(item, other)), None)
            if match is None:
                return False
            left.pop(match)
        return True
    return all(map(agree, items, others))


def proportional(pairs: list[tuple]) -> bool:
    """2y = 4x + 6 and y − 2x = 3: the differences of the sides have one ratio, positive for inequalities."""
    kind = pairs[0][0][0]
    pairs = [(x[1][0] - x[1][1], y[1][0] - y[1][1]) for x, y in pairs]
    x, y = pairs[0]
    same = not close(x, 0) and not close(y, 0) and all(close(u * y, v * x) for u, v in pairs)
    return same and (kind == "=" or x / y > 0)


def is_rounding(decimal: str, value) -> bool:
    """0.33 of a value of 1/3. A finite decimal is never rounded: 0.54 is not 0.5."""
    match = re.fullmatch(r"-?(\d*)\.(\d+)", decimal.strip())
    if not match or len(match[2]) < 2 and len(match[1]) < 2 or MP.im(value) != 0:
        return False
    scaled, error = value * MP.mpf(10) ** 100, abs(value - Evaluator(match[0], {}).value())
    return not close(scaled, MP.nint(scaled)) and error * 2 * 10 ** len(match[2]) <= 1


UNITS = """mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, in inch inche,
    ft foot feet, mi mile, g gram, kg kilogram, lb pound, s sec second, min minute, h hr hour, l liter litre,
    $ dollar usd, ml milliliter millilitre, € euro, ¢ cent, v volt, w watt, j joule, n newton, % percent"""
UNITS = {name: names.split()[0] for names in UNITS.split(",") for name in names.split()}


def split_unit(text: str) -> tuple[str, str]:
    """An answer without its unit, and the unit in one spelling: square centimeters → cm^2."""
    match = re.fullmatch(r'([$€£]?)(.*?[^" ]) *((?:"[^"]*"(?:\^\{?\d\}?)?|%)?)', text)
    if not match:
        return text, ""
    words = match[1] + match[3].lower().replace(" per ", "/")
    if re.search(
        r"[,<>=]|\b(not|than|least|most|more|less|fewer|to|between|trillion|tenths|hundredths|squared)\b",
        words,
    ):
        raise ValueError("a bound, not a unit")
    words = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", words))
    words = [UNITS.get(word) or word.removesuffix("s") for word in re.findall(r"\w+|[^\w\s\"{}.]", words)]
    return match[2], "" if "unit" in words else "".join(UNITS.get(word, word) for word in words)


def gather(text: str) -> str:
    """Equations in a row as one: b=7, a=332 is (a,b)=(332,7), and x=1, x=2 (or x=1, 2) is x={1,2}."""
    pieces = [re.fullmatch(rf" ?(?:({NAME}) ?=)?([^=]*)", piece) for piece in text.split(",")]
    if len(pieces) < 2 or None in pieces or not pieces[0][1] or re.search(r"[(\[]", text):
        return text
    names = {piece[1].partition("_")[0] for piece in pieces if piece[1]}
    if len(names) == 1:
        return rf"{pieces[0][1]}=\{{{','.join(piece[2] for piece in pieces)}\}}"
    pieces.sort(key=lambda piece: piece[1] or "")
    return f"({','.join(piece[1] or '?' for piece in pieces)})=({','.join(piece[2] for piece in pieces)})"


def stated(text: str) -> str:
    """What an equation states: 5 of x = y = 5, x^2 of f(x) = x^2, 1023 of 2^{10} − 1 = 1023."""
    sides = text.split("=")
    # A name has no digits, except in subscripts and arguments.
    argument = re.compile(r"_\{[^{}]*\}|_\w|^ ?[fghFGPQ]\(.*\)")
    named = [side for side in sides if not re.search(r"\d", argument.sub("", side))]
    if len(named) == len(sides):  # n = m + p names n
        named = [side for side in sides[:1] if re.fullmatch(rf" ?{NAME} ?(\(.*\))? ?", side)]
    rest = [side for side in sides if side not in named]
    used = {name for side in rest for name in re.findall(NAME, side)}
    if any("(" not in side and used & set(re.findall(NAME, side)) for side in named):  # x = 2x + 1
        return text
    return rest[-1] if rest and all(equal(side, rest[-1]) for side in rest[:-1]) else text


def as_intervals(text: str) -> tuple[str, str]:
    """The variable and the intervals of inequalities: x<2, x≥3 → x, (-∞,2) ∪ [3,∞)."""
    names, intervals = set(), []
    for piece in text.split(","):
        sides = re.split("([<>≤≥])", piece)
        if re.search("[>≥]", piece):
            sides = [{">": "<", "≥": "≤"}.get(side, side) for side in reversed(sides)]
        names |= {side.strip() for side in sides if re.fullmatch(f" ?{NAME} ?", side)}
        if len(sides) == 3:
            sides = [r"-\infty ", "<", *sides] if sides[0].strip() in names else [*sides, "<", r"\infty "]
        if len(sides) != 5 or len(names) != 1 or sides[2].strip() not in names:
            return "", text
        intervals.append("[("[sides[1] == "<"] + sides[0] + "," + sides[4] + "])"[sides[3] == "<"])
    return names.pop(), r"\cup ".join(intervals)


def exact_side(text: str) -> str:
    """√2 ≈ 1.41 states √2, if that is so."""
    exact, _, rounded = text.partition("≈")
    if rounded and not is_rounding(rounded, values_at_points(exact, exact)[0][0]):
        raise ValueError("not a rounding")
    return exact


def equal(a: str, b: str) -> bool:
    """Whether normalised `a` is right where normalised `b` is the reference."""
    a, b = (gather(exact_side(text)) for text in (a, b))
    if ("=" in a) != ("=" in b):
        a, b = (stated(text) if "=" in text else text for text in (a, b))
    elif "=" in a and a.split("=")[0].strip() == b.split("=")[0].strip():
        a, b = (text.split("=", 1)[1] for text in (a, b))
    (name_a, region_a), (name_b, region_b) = as_intervals(a), as_intervals(b)
    if name_a and name_b and name_a != name_b:
        return False
    if not re.search("[<>≤≥]", region_a + region_b):
        a, b = region_a, region_b
    (a, unit_a), (b, unit_b) = split_unit(a), split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    pairs = values_at_points(a, b)
    x, y = pairs[0]
    if type(x) is type(y) is tuple and x[0] == y[0] and x[0] in "=<≤" and len(x[1]) == len(y[1]) == 2:
        return proportional(pairs)
    if "%" in (unit_a, unit_b) and unit_a != unit_b:  # 50% is 0.5 and also 50
        percent, other = (x, y) if unit_a == "%" else (y, x)
        return close(percent, other * 100) or close(percent, other) and 0 < percent <= 1000
    if all(agree(x, y) for x, y in pairs):
        return True
    constant = re.compile(r"\+ ?C$|^C ?[+-]")
    if constant.search(a) and constant.search(b):  # + C absorbs any constant
        return all(close(u - v, x - y) for u, v in pairs)
    return len(pairs) == 1 and type(x) is not tuple and is_rounding(b, x)


# -- the verdict --------------------------------------------------------------------------------------------------

PLAIN = re.compile(r"0|-?[1-9]\d*")
GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]|\.\d*,| \d)")
BASED = re.compile(r'\(?"?(\d[0-9A-F]*|[A-F]+\d[0-9A-F]*)"?\)? ?_\{?(-?\d+)\}?')
CHOICE = re.compile(r'"?\(?([A-E])(?:[).:]+"? *(.*)|"?)', re.IGNORECASE)
FAILURES = ValueError, ArithmeticError, TypeError, LookupError, RecursionError, NotImplementedError


def is_word(text: str) -> bool:
    """Text rather than a product of letters: quoted, or four letters, or three with a capital."""
    return bool(re.fullmatch(r"[\"A-Za-z .'-]+", text) and re.search(r'"|[A-Za-z]{4}|[A-Z][A-Za-z]{2}', text))


def ungroup(text: str) -> str:
    """1,234 outside brackets is a number."""
    return text if re.search(r"[(\[]|\\\{", text) else GROUPED.sub(lambda m: re.sub("[, ]", "", m[0]), text)


def decide(answer: str, reference: str, choices: dict[str, str] | None = None) -> tuple[bool, str]:
    """The verdict and the stage that gave it: string, number, value, or refused."""
    answer, reference = answer.strip(), reference.strip()
    if PLAIN.fullmatch(answer) and PLAIN.fullmatch(reference):
        return answer == reference, "number"
    try:
        a, b = normalise(answer), normalise(reference)
        if a and re.sub(r"(?<!\d) | (?!\d)", "", a) == re.sub(r"(?<!\d) | (?!\d)", "", b):
            return True, "string"
        option = CHOICE.fullmatch(b)
        if option and option[1].isupper():
            return same_choice(a, option[1], option[2], choices or {}), "string"
        if is_word(a) or is_word(b):
            return re.sub(r"[^a-z]", "", a.lower()) == re.sub(r"[^a-z]", "", b.lower()), "string"
        based = BASED.fullmatch(a), BASED.fullmatch(b)
        if any(based):  # the same number in another base is the question
            return all(based) and len({(match[1].lstrip("0"), match[2]) for match in based}) == 1, "string"
        return equal(ungroup(a), ungroup(b)) or "," in b and equal(a, b), "value"
    except FAILURES:
        return answer == reference != "", "refused"


def same_choice(answer: str, letter: str, content: str | None, choices: dict[str, str]) -> bool:
    """The letter, the letter with its content, or (where choices are known) the content of no other letter."""
    chosen = CHOICE.fullmatch(answer)
    if not chosen:
        return [name for name, text in choices.items() if is_equal(answer, text)] == [letter]
    if chosen[1].upper() != letter or not chosen[2]:
        return chosen[1].upper() == letter
    if letter in choices or content:
        return is_equal(chosen[2], choices.get(letter, content))
    return not re.search(r"\b[A-E]\b|,", chosen[2], re.IGNORECASE)


def is_equal(answer: str, reference: str, choices: dict[str, str] | None = None) -> bool:
    """Whether a careful human grader would accept `answer` for `reference`. Deterministic, never raises."""
    return decide(answer, reference, choices)[0]


def grade(response: str, reference: str, finish_reason: str = "stop") -> float:
    """ORZ's rule: 1.0 only if generation stopped by itself and the extracted answer is equal."""
    return float(finish_reason == "stop" and is_equal(extract_answer(response), reference))


# ORZ's five; it counts them case-sensitively and so misses "Wait,".
REFLECTION = {
    name.strip(",[s]\\"): name for name in ("wait,", r"recheck[,\s]", "retry", "alternatively,", "however,")
}


def response_stats(response: str) -> dict[str, float]:
    """Counts of ORZ's reflection patterns, 1.0 for the thinking format, and the share of repeated 8-word windows."""
    words, lower = response.split(), response.lower()
    windows = list(zip(*(words[start:] for start in range(8)), strict=False))
    think = response.find("</think>")
    begin = response.find("<answer>", max(think, 0))
    stats = {name: float(len(re.findall(pattern, lower))) for name, pattern in REFLECTION.items()}
    stats["think_format"] = float(think >= 0 and 0 <= begin < response.find("</answer>", max(begin, 0)))
    stats["repetition"] = 1 - len(set(windows)) / len(windows) if windows else 0.0
    return stats


# -- Grader: a pool of processes ----------------------------------------------------------------------------------


def serve() -> None:
    """One process of the pool: items in as JSON lines, verdicts out, each within its own CPU time."""
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: die with the parent, even if that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(
            signal.ITIMER_PROF, CPU_SECONDS
        )  # no handler: SIGPROF ends the process, even inside C
        verdict = decide(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


OUTCOMES = "graded", "cut_off", "no_answer", "by_string", "by_number", "by_value", "refused"
OUTCOMES += "timed_out", "backstop", "crashed"


class Grader:
    """A pool of grading processes: `submit` returns a Future of 1.0 or 0.0; a hung or crashed item is 0.0.

    Processes are plain `python reward.py`, each owned by one thread: nothing of the parent (Ray, torch, its
    __main__) is inherited or imported, and the clock of an item starts when its process starts it.
    """

    def __init__(self, num_processes: int = 2):
        self.items, self.lock = queue.SimpleQueue(), threading.Lock()
        self.counts = Counter(dict.fromkeys(OUTCOMES, 0))
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_processes)]
        for thread in self.threads:
            thread.start()

    def submit(self, response: str, reference: str, finish_reason: str = "stop", choices=None) -> Future:
        """Grade one response. What needs no reading is decided here, the rest in a process."""
        future = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        answer = extract_answer(response) if finish_reason == "stop" else ""
        if answer and answer != reference:
            self.items.put((future, [answer, reference, choices]))
        elif answer:
            self._finish(future, 1.0, "by_string")
        else:
            self._finish(future, 0.0, "no_answer" if finish_reason == "stop" else "cut_off")
        return future

    def stats(self) -> dict[str, int]:
        """Counts so far: graded, and of these each outcome; timed_out is CPU time, backstop is wall clock."""
        with self.lock:
            return dict(self.counts)

    def close(self) -> None:
        """Finish what was submitted, then end every process."""
        for _ in self.threads:
            self.items.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _finish(self, future: Future, reward: float, outcome: str) -> None:
        with self.lock:
            self.counts.update(("graded", outcome))
        future.set_result(reward)

    def _run(self) -> None:
        """One thread and its process, which is replaced when it has died."""
        process, command = None, [sys.executable, os.path.abspath(__file__)]
        while (item := self.items.get()) is not None:
            future, request = item
            try:
                if process is None or process.poll() is not None:
                    process = subprocess.Popen(command, stdin=-1, stdout=-1, process_group=0)
                self._finish(future, *ask(process, request))
            except OSError as error:  # no process could be started
                future.set_exception(error)
        if process is not None:
            process.stdin.close()
            process.wait()


def ask(process: subprocess.Popen, request: list) -> tuple[float, str]:
    """Send one item and wait for its verdict; a process that gives none has ended when this returns."""
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died, so that the line below is empty
    if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
        process.kill()
        process.wait()
        return 0.0, "backstop"
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        return 0.0, "timed_out" if process.wait() == -signal.SIGPROF else "crashed"
    verdict, stage = json.loads(line)
    return float(verdict), stage if stage == "refused" else "by_" + stage


if __name__ == "__main__":
    serve()
