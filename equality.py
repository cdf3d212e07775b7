"""Is it the same mathematics? Decides whether an answer equals a reference.

In:   the text of an answer, the reference, the contents of the choices where there are any.
Out:  (equal, how that was found: by_number, by_string, by_value, or refused).

    normalise (one spelling) → decide (choices, words) → equal (what is stated, intervals, units)
              → values_at_points (read by equality.lark) → agree (part by part)

Two answers are equal if they have the same value: constants to a thousand digits, expressions at fixed points.
Nothing of an answer is ever run as code: lark reads it, and `compute` knows nothing but the words of the grammar.

Only grading processes import this file; reward.py starts them.
"""

import functools
import re
import unicodedata
import zlib

from lark import Lark, LarkError, Token, Tree
from mpmath.ctx_mp import MPContext

# Work is refused before it starts where it is larger than any of 5,238 real references needs: characters of an
# answer, its opening brackets of one kind, n in n!, bits of a power (2013^2014 has 22,000).
MAX_CHARS, MAX_BRACKETS, MAX_WHOLE, MAX_BITS = 1000, 100, 20000, 1 << 17
# Bits of a number: with variables, in constants, and in constants of rationals alone: integers are exact.
BITS, BITS_REAL, BITS_WHOLE = 1 << 11, 1 << 12, 1 << 16
MP = MPContext()  # of our own: mpmath's global precision is left alone
PARSER = Lark.open("equality.lark", rel_to=__file__, parser="lalr")
NAME, FUNCTION = (PARSER.get_terminal(name).pattern.value for name in ("NAME", "FUNCTION"))
GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"""
GREEK = "|".join(GREEK.split())
# A letter that stands for something: neither a constant nor a command like \not.
VARIABLE = rf"(?:(?![eiπ](?!_))[^\W\d_]|\\(?:{GREEK})(?![a-zA-Z]))(?:_(?:\{{[^{{}}]*\}}|\w))?'*"


# -- normalise: one spelling for the same mathematics -----------------------------------------------------------

# What is one sign in mathematics becomes one character, so that \cosx, \piR and \leqx are read, too (\leq before \le).
SIGNS = r"""\lt < \gt > \dbinom \binom \tbinom \binom \cfrac \frac \colon : \leqslant ≤ \leqq ≤ \leq ≤ \le ≤ <= ≤ \geqslant ≥ \geqq ≥ \geq ≥ \ge ≥ >= ≥ \neq ≠ \ne ≠ != ≠ \infty ∞ \in ∈ \equiv ≡ \\ , ; ,
    \approx ≈ \cdots … \cdot * \times * × * · * \div / ÷ / ⁄ / − - – - \pi π \cup , ∪ , \pm ± \mp ∓ \emptyset ∅ \varnothing ∅
    \sqrt √ \ldots … \dots … ... … \mid | \vert | \lvert | \rvert | \langle ( \rangle ) \lfloor \floor(
    \rfloor ) \lceil \ceil( \rceil ) \lor , \vee , \degree ° \circ ° \mathbb{R} (-∞,∞) \dfrac \frac \tfrac \frac \% % \$ $"""
SIGNS = dict(zip(SIGNS.split()[::2], SIGNS.split()[1::2], strict=True))
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"infinity": "∞", "all real numbers": "(-∞,∞)"}
BEHIND = {"thousand": "*1000", "million": "*10^6", "degrees": "°", "percent": "%"}
LESS = str.maketrans(">≥", "<≤")
UNIT = r"[mckd]m|kg|m[glL]|[kM]?eV|mph|\\Omega|(?<= )[msghLVNJW]|[a-zA-Z]{4,}(?: [a-zA-Z]+)*"
GROUPED = r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]|\.\d*,| \d|.*(?:[)\]]|\\\}))"


def both_signs(match: re.Match) -> str:
    """3 ± √2 → 3 + √2, 3 − √2."""
    return ",".join(match[0].translate(str.maketrans("±∓", signs)) for signs in ("+-", "-+"))


def repeating(match: re.Match) -> str:
    """0.1\\overline{6} → (0.10+\\frac{6}{90})."""
    return rf"({match[1]}0+\frac{{{match[3]}}}{{{(10 ** len(match[3]) - 1) * 10 ** len(match[2])}}})"


def subscript(match: re.Match) -> str:
    """b_{2} → b_2, A_{ 12 } → A_{12}."""
    label = match[1].replace(" ", "")
    return f"_{label} " if len(label) == 1 else f"_{{{label}}}"


# In this order. Afterwards "…" is text, $ the dollar, and relations are one character.
REWRITES = [
    (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),  # bold in Markdown
    (r"(?<=[\w)}]) ?\*\* ?(?=[\w({-])", "^"),
    (r"[\\\s]+$", ""),  # a line break behind all
    (r'"|(?<!\\)\$(?!\d[\d.,]*$)|(?<!\\)\\[()\[\]]', ""),  # math delimiters, but "$5" is money
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|math(?:bf|it|cal)|boldsymbol)(?![a-zA-Z])|\\! *", ""),
    (r"(?:(?<!\\)\\[,;:> ]|~|\\(?:q?quad|angle|triangle)(?![a-z])|\\(?:begin|end)\{cases\}|\{,\}|\s)+", " "),
    (r"^ ?(?:\\boxed ?\{(.*)|\{([^{}]*))\} ?$", r"\1\2"),
    (r"\\(?:mathrm|operatorname) ?\{ ?([ei]) ?\}", r" \1 "),  # a roman constant
    (r"\\(?:text(?:bf|it|rm|sf|normal)?|mathrm|mbox|operatorname\*?) ?\{([^{}]*)\}", r'"\1"'),
    (r'(?i)^ ?"? ?(?:(?:the )?answer(?: is)?:?|option|approximately|\\approx) ?"?', ""),
    # A number in words stands alone: 2"five" is not 25. A magnitude stands behind a number.
    (
        rf'(?i)(?:^|(?<=[=,(\[{{∈+-])) ?" ?({"|".join(NUMBERS)})[ .]?"(?= ?[",)}}=]| ?$)',
        lambda m: NUMBERS[m[1].lower()],
    ),
    (r"(?i)(?<![a-z\\])infinity(?![a-z])", "∞"),
    (r'(?<=[\d}]) ?" ?min ?"', '"minute"'),
    (rf'(?i)(?<=[\d}})]) ?" ?({"|".join(BEHIND)})[ .]?"', lambda match: BEHIND[match[1].lower()]),
    (rf'" ?({FUNCTION[2:]}|pi) ?"|(?<![\\a-zA-Z])({FUNCTION[2:]}|sqrt|pi|infty)(?![a-zA-Z])', r"\\\1\2 "),
    (r'\(? ?\\?"? ?(?<![a-z])[pb]?mod(?![a-z]) ?"?([^()]*)\)?', r"@\1"),
    (r"(\d*\.(\d*))\\(?:overline|bar|dot) ?\{?(\d+)\}?", repeating),
    (r"\\not ?=", "≠"),
    (r"\\mathbb ?([A-Z])", r"\\mathbb{\1}"),
    (r"\\\{ *\\\}", "∅"),
    ("|".join(map(re.escape, SIGNS)), lambda match: SIGNS[match[0]]),
    (r"_ ?\{([^{}]*)\}", subscript),
    (r"\\frac ?(\d) (\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"(?i)(?<=[\d}]) ?percent(?![a-z])", "%"),
    (r"(?<=\d) ?([€£¥¢])", r'"\1"'),
    (r'\^ ?\{? ?(°|"(?:st|nd|rd|th)") ?\}?', lambda match: "°" if match[1] == "°" else ""),
    # Outside of functions ° is a unit: behind all of an answer it is kept.
    (r"^((?!\\(?:sin|cos|tan)).)*$", lambda m: re.sub(r"(?<=[\d})])°$", '"degree"', m[0]).replace("°", "")),
    (r'(?:, ?)?"? ?(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]) ?"?', ","),
    # What is named, not its name: a member, an approximation, a class, a point, a function, a set.
    (rf"^ ?{VARIABLE} ?[∈≈≡]|, ?[j-n] ?∈ ?(?:\\mathbb ?\{{?)?[NZ]\}}? ?$|^ ?[A-Z] ?(?=\(.*,.*\) ?$)", ""),
    (r"^ ?[a-zA-Z] ?\([a-z]\) ?=(?!.*=)(?! ?[a-zA-Z] ?$)|, ?[a-z] ?∈ ?\(-∞,∞\)$", ""),
    (r"^\\\{ ?([a-z]) ?(?:∈ ?\(-∞,∞\) ?)?[|:](?=[^<>≤≥=]*[<>≤≥=])(?=.*\1)(.*)\\\}$", r"\2"),
    (r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?= \d+/\d)", lambda match: match[0].replace(" ", "")),
    (r"(?<![\d.^_])(\d+)(?: ?(\\frac(?: ?\d|\{\d+\}){2})| (\d+/\d+))(?!\d)", r"{\1+\2\3}"),  # a mixed number
    (r"\\(sin|cos|tan|cot) ?\^ ?\{?-1\}?", r"\\arc\1 "),
    (rf"^([^,=<>≠]+)≠ ?({VARIABLE})$", r"\2≠\1"),
    (rf"^(?: ?{VARIABLE} ?≠|\(-∞,∞\) *\\setminus *\\\{{)([^,]*?)(?:\\\}})?$", r"(-∞,\1),(\1,∞)"),
    (r"^([^≈]*)≈([^≈]*)$", r"\2=\1"),  # what is exact is stated
    (r"[^,<>≤≥]*(?:[>≥][^,<>≤≥]*)+", lambda m: "".join(re.split("([>≥])", m[0])[::-1]).translate(LESS)),
    # |x|<1 is -1<x<1, and (x,y)=(1,2), below, is x=1,y=2.
    (rf"^ ?\|({VARIABLE})\| ?([<≤])([^,]*)$", r"-(\3)\2\1\2\3"),
    (r"\|([^|]*)\|", r"\\abs(\1)"),
    (r"(?:^|(?<=,)|(?<=\\\{))(?:[^,\\]|\\[^{}])*[±∓](?:[^,\\]|\\[^{}])*", both_signs),
    (r'^\(?"?([\dA-F]*\d[\dA-F]*)"?\)? ?_\{?(-?\d+)\}? ?$', r"\1_{\2}"),  # digits in a base
    (rf"(?<=[\d}}]) ?({UNIT})(?=\^|[ ,;)%]|$)", r'"\1"'),  # a bare unit is text, too
    (r"^\(([a-zA-Z]), ?([a-zA-Z])\) ?= ?\(([^,()]*),([^,()]*)\)$", r"\1=\3,\2=\4"),
    (GROUPED, lambda match: re.sub("[, ]", "", match[0])),
]


@functools.lru_cache(1024)  # 64 responses have one reference
def normalise(text: str) -> str:
    """One spelling: no delimiters, boxes or sizes, text in double quotes, single spaces."""
    if len(text) > MAX_CHARS or max(map(text.count, "([{")) > MAX_BRACKETS or text.count("\\boxed") > 1:
        raise ValueError("too long, or two answers")
    text = re.sub("([¼-¾⅐-⅞])", r" \1", re.sub("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}", text))
    text = unicodedata.normalize("NFKC", text).strip()
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return re.sub(" +", " ", text).strip()


# -- values: read by a grammar, computed at points ----------------------------------------------------------------


def call(name, base, exponent, argument):
    """\\log_2 x, \\sin^2 x, \\max(a, b)."""
    result = COMPUTED[name[1:].replace("arc", "a")](*(argument[1] if type(argument) is tuple else [argument]))
    return MP.power(result if base is None else result / MP.ln(base), 1 if exponent is None else exponent)


# What the words of the grammar compute; all others are structures: (word, [values]).
COMPUTED = "fadd fsub fmul fdiv fneg sin cos tan cot sec csc asin acos atan acot ln log exp sqrt"
COMPUTED = {n: getattr(MP, n) for n in (COMPUTED + " radians power fac fac2 binomial floor ceil").split()}
COMPUTED |= {"call": call, "lg": MP.log10, "abs": abs, "min": min, "max": max, "percent": lambda x: x / 100}
COMPUTED |= {"start": lambda x: x, "relation": lambda a, sign, b: (sign, [b - a])}
COMPUTED |= {"root": lambda n, x: MP.sign(x) * abs(x) ** (1 / n) if n % 2 == 1 else x ** (1 / n)}
COMPUTED |= {"ratio": lambda a, *b: ("ratio", [a / x for x in b]) if len(b) > 1 else a / b[0]}
COMPUTED |= {"mod": lambda a, n: ("mod", [a % n, n])}
CONSTANTS = {"i": MP.j, "e": MP.e, "π": MP.pi, "∞": MP.inf, "∅": ("set", [])}


def compute(tree, point: dict):
    """The value of a tree at a point: a number, or (word, [values]) for a list, set, tuple, interval or relation."""
    if not isinstance(tree, Tree):
        return point.get(tree, tree)
    values = [compute(child, point) for child in tree.children]
    if tree.data in ("fac", "fac2", "binomial") and abs(values[0]) > MAX_WHOLE:
        raise ValueError("too large")
    if tree.data == "power" and values[0] != 0 and abs(values[1] * MP.mag(values[0])) > MAX_BITS:
        raise ValueError("too large")
    if tree.data not in COMPUTED:
        return tree.data, values
    # ∞ is a bound and an answer, but no number: 2∞, ∞ + 5 and x = ∞ have no value.
    if tree.data not in ("start", "fneg") and any(
        type(x) is not tuple and type(x) is not Token and x is not None and MP.isinf(x) for x in values
    ):
        raise ValueError("arithmetic with infinity")
    value = COMPUTED[tree.data](*values)
    if (
        type(value) is not tuple
        and value != 0
        and not MP.isinf(value)
        and abs(MP.mag(value)) > MP.prec // 2 - 50
    ):
        raise ValueError("too large, or too small, to tell a sum with it from its neighbours")
    return value


@functools.lru_cache(1024)
def parse(text: str) -> tuple[Tree, frozenset, int] | None:
    """The tree of a normalised text, its symbols, and the bits that its constants need; None where it is not read."""
    # Words and numbers side by side are not products, and 11:50 is not a ratio.
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{4}|(?<![_\d^])\d+ \.?\d|^\d?\d:[0-5]\d$", text):
        return None
    try:
        tree = PARSER.parse(text)
    except LarkError:
        return None
    symbols = {token for token in tree.scan_values(bool) if token.type == "NAME"} - CONSTANTS.keys()
    is_rational = not re.search(r"[ei√π]|\\[a-z]", re.sub(r"\\(?:frac|binom)", "", text))
    bits = BITS_WHOLE if is_rational else BITS_REAL
    return tree, frozenset(symbols), BITS if symbols else bits


@functools.lru_cache(1024)
def value_at(text: str, bits: int, trial: int):
    """The value of a normalised text at the fixed point `trial`; None where it has none."""
    tree, symbols, _ = parse(text)
    MP.prec = bits
    MP.trap_complex = trial == 4  # √(a²b) is a√b for lengths: nothing complex where they are negative
    tokens = {token for token in tree.scan_values(bool) if token.type in ("NUMBER", "DIGIT")}
    point = (
        CONSTANTS
        | {token: MP.mpf(token) for token in tokens}
        | {name: sample(name, trial) for name in symbols}
    )
    try:
        return compute(tree, point)
    except (ValueError, ArithmeticError, TypeError, LookupError, RuntimeError):
        return None


def values_at_points(a: str, b: str):
    """Pairs of values at fixed points: j, k … n positive integers, other symbols fractions, once negative."""
    (_, symbols, bits), (_, others, other_bits) = parse(a), parse(b)
    for trial in range(5 if symbols | others else 1):
        bits = MP.prec = min(bits, other_bits)
        x, y = value_at(a, bits, trial), value_at(b, bits, trial)
        if x is not None and y is not None:
            yield x, y


def sample(name: str, trial: int):
    """A value for a symbol, in general position: on a grid x + y would be x_1 + x_2."""
    scattered = zlib.crc32(f"{name} {trial}".encode())
    fraction = MP.mpf(scattered % 997 + 500) / (1000 if trial < 4 else -1000)
    return MP.mpf(scattered % 11 + 2) if name[0] in "jklmnN" else fraction


# -- equal: the same value, part by part --------------------------------------------------------------------------


def close(x, y) -> bool:
    """Equal to the precision of the numbers: `compute` has refused numbers that would need a higher one."""
    if x == y or MP.isinf(x) or MP.isinf(y):
        return x == y
    return abs(x - y) <= MP.ldexp(max(abs(x), abs(y), 1), 100 - MP.prec)


def agree(a, b) -> bool:
    """Whether two values are the same: lists and sets in any order, everything else in order."""
    if type(a) is not tuple or type(b) is not tuple:
        return type(a) is not tuple and type(b) is not tuple and close(a, b)
    (kind, items), (other, rest) = a, b
    if {kind, other} <= {"list", "set"}:  # each as often here as there
        return all(sum(agree(x, y) for y in items) == sum(agree(x, y) for y in rest) for x in items + rest)
    return kind == other and len(items) == len(rest) and all(map(agree, items, rest))


def is_rounding(decimal: str, value) -> bool:
    """0.33 of a value of 1/3. A finite decimal is never rounded: 0.54 is not 0.5."""
    match = re.fullmatch(r" ?-?(?:\d*\.(\d\d+)|\d\d+\.(\d)) ?", decimal)
    if not match or MP.im(value) != 0 or close(value * 10**100, MP.nint(value * 10**100)):
        return False
    return abs(value - MP.mpf(decimal.strip())) * 2 * 10 ** len(match[1] or match[2]) <= 1


# Units of measure, each with its other spellings: the first one names it.
UNITS = r"""cm centimeter centimetre, m meter metre, km kilometer kilometre, mm millimeter millimetre, dm decimeter decimetre,
    nm nanometer nanometre, in inch inche, ft foot feet, yd yard, mi mile, s sec second, min minute, h hr hour, day, wk week,
    month mo, yr year, decade, century centurie, kg kilogram, g gm gram, mg milligram, lb pound, oz ounce, ton tonne, l L liter litre,
    ml mL milliliter millilitre, cl centiliter, gal gallon, qt quart, pt pint, cup, $ dollar usd buck, ¢ cent penny pennie, € euro eur,
    £ gbp, ¥ yen, ruble rouble, yuan, rupee, peso, mph, kph kmh, rpm, hz hertz, khz, mhz, N newton, J joule, kj, W watt, kw, V volt,
    A amp ampere, \Omega Ω ohm, pa pascal, kpa, atm, bar, K kelvin, C celsius, F fahrenheit, degree deg °, radian rad, mol mole, M,
    eV ev, kev, mev, gev, acre, hectare ha, bit, byte, kb, mb, gb, unit, am, pm"""
# What is counted.
COUNTED = """adult animal answer ant apple arrangement arrow atom bag bale ball balloon banana bar barrel basket bead bean bear bee bike
    bill bird block blouse boat book bottle bowl box boy bracelet branch bread brick bridge brother bucket bug building bulb bus bush
    button cabbage cake camel can candidate candy candle car card carrot cat chair chicken child children chip chocolate choice choir
    chord circle city citie clip club coin color colour column combination contestant cookie copy copie corner cow crate crayon cubes
    cupcake customer dancer desk diagonal dice die digit dish divisor dog doll domino donut door doughnut duck edge egg element
    elephant employee envelope error event face factor family familie fan farmer feather fence finger fish flag flavor flea floor
    flower frog fruit function game gate gift girl glass goal goat goose geese grade grain grape graph guest hamster handshake hat head
    hen hole horse house integer intersection item jar key kid king kitten knight lamp leaf leave leg lemon letter light
    line lion list log man marble mark match meal member men mice mistake monkey mouse move muffin mug necklace note notebook number
    nurse object onion option orange outcome outfit owl pack package page painting pair pan pancake paper parent part participant
    partition party partie passenger path patient pea peach pear pearl pebble pen pencil pentagon people permutation person phone
    photo piece pig pigeon pile pill pizza plane plant plate player point pole polygon polynomial pond potato potatoe prisoner
    problem puppy puppie question rabbit rectangle region ribbon ring road robot rock room roots rope rose row rower sandwich
    sandwiche seat seed segment sequence set sheep sheet shelf shelve shell ship shirt shoe side sister slice snail sock soldier
    solution song spider squares squirrel stamp star state station step stick sticker stone story storie stranger strawberry
    strawberrie string student subject subset sweet symbol table tail teacher team term test ticket tie tile time toy tourist town
    track train tree triangle triple trip truck tulip turtle value vector vehicle vertex vertice vertices visitor vote voter wagon
    walnut watermelon way wheel window wolf wolve woman women word worker"""
UNITS = {name: names.split()[0] for names in UNITS.split(",") for name in names.split()}
UNITS |= {name: name for name in COUNTED.split()} | {sign: sign for sign in "^*/-123"}


@functools.lru_cache(1024)
def split_unit(text: str) -> tuple[str, str, bool]:
    """An answer without its unit, the unit in one spelling, and whether it is known: square centimeters → cm^2."""
    match = re.fullmatch(r'([$€£]?)(.*?[^" ]) *((?:"(?:[^"\d]|\^[{-]*\d)*"(?:\^[{-]*\d\}?)?[ */]*)*)', text)
    if not match:
        return text, "", True
    words = re.sub(r"(?:square|sq\.?) (\w+)", r"\1^2", match[1] + match[3].replace(" per ", "/"))
    words = re.sub(r"cubic (\w+)", r"\1^3", words)
    words = re.findall(r"\\?[^\W\d]+|\d+|[^\w\s\"{}.]", words)
    unit = [next((UNITS[form] for form in forms(word) if form in UNITS), None) for word in words]
    known = None not in unit
    unit = [name or word.lower() for name, word in zip(unit, words, strict=True)]
    return match[2], "" if "unit" in unit else "".join(unit), known


def forms(word: str) -> list[str]:
    """A unit as it is written, in small letters where it is more than a symbol, and without its plural's s."""
    lower = word.lower() if len(word) > 1 else word
    return [word, lower, lower.removesuffix("s")]


# Words that may stand before "=": what is sought, not a remark about it.
SOUGHT = """the a of is total answer solution result value number sum difference product quotient ratio rate probability chance
    area perimeter circumference volume surface length width height depth radius diameter distance speed velocity time age angle slope
    side base weight mass cost price profit mean median mode average range variance maximum minimum max min lim remainder"""
SOUGHT = set(SOUGHT.split())
COMMANDS = rf"{GREEK}|frac|overline|bar|vec|hat|widehat|overrightarrow|det|deg|Delta|{FUNCTION[5:-1]}"


def is_named(text: str) -> bool:
    """Whether something with this name is sought: AB, S_{ABC}, f(x, y), \\frac{TM}{MK}, \\text{the area}, but not \\text{surely not} y."""
    text = re.sub(r"_(?:\{[^{}]*\}|\w)", "", text.strip())  # a subscript is a label
    text = re.sub(r"^([fghpqFGHP]'*)(?:\^\{-1\})? ?\((?:-?\d+|[a-z])\)$", r"\1", text)  # f(2), f^{-1}(x)
    text, commands = re.sub(r"\\([a-zA-Z]+)", "", text), re.findall(r"\\([a-zA-Z]+)", text)
    if not all(re.fullmatch(COMMANDS, command) for command in commands):
        return False
    quoted, bare = re.findall(r'"([^"]*)"', text), re.sub(r'"[^"]*"', "", text)
    if re.search(r"[^a-zA-Z(){}, ':]", bare) or not all(re.fullmatch("[a-zA-Z .]*", part) for part in quoted):
        return False
    words = re.findall("[a-zA-Z]+", " ".join(quoted).lower())
    runs = re.findall("[a-zA-Z]+", bare)
    symbols = [run for run in runs if run.lower() not in SOUGHT]
    # One symbol, a pair without the letters i and o (no, is, or, if, of), points (ABC), or single letters.
    letters = all(re.fullmatch(r"[a-zA-Z]|[a-hj-np-zA-Z]{2}|[A-Z]{2,6}", run) for run in symbols)
    apart = not re.search(r"[a-zA-Z]{2,} +[a-zA-Z]", bare) or len(symbols) < 2
    return (
        letters
        and apart
        and all(len(word) == 1 or word in SOUGHT for word in words)
        and bool(runs or words or commands)
    )


def symbols_in(text: str) -> set[str]:
    """The letters of an expression, commands left out."""
    return set(re.findall(NAME, re.sub(rf"\\(?:frac|binom|{FUNCTION[5:-1]})|\"[^\"]*\"", " ", text)))


def states(name: str, value: str) -> bool:
    """Whether name = value gives a name to the value; x = 2x + 1 states nothing."""
    head = re.sub(r"\([^()]*\)", "", name)  # f of f(x) = x^2
    return is_named(name) and not symbols_in(head) & symbols_in(value)


@functools.lru_cache(1024)
def stated(text: str) -> str:
    """What a relation states: 5 of x = y = 5, x^2 of f(x) = x^2, 1023 of 2^{10} − 1 = 1023, (-∞,2) of x<2."""
    *names, value = text.split("=")
    names = [name for name in names if not states(name, value)]
    text = value if all(equal(value, name) for name in names) else text
    match = re.fullmatch(rf"(?=.*[<≤])(?:([^<≤]*)([<≤]))? ?{VARIABLE} ?(?:([<≤])([^<≤]*))?", text)
    low, left, right, high = match.groups() if match else [None] * 4
    return f"{'(['[left == '≤']}{low or '-∞'},{high or '∞'}{')]'[right == '≤']}" if match else text


def is_percentage(text: str) -> bool:
    """50%, but not 5 + 3%."""
    tree = parse(text)[0].children[0]
    while isinstance(tree, Tree) and tree.data == "fneg":
        tree = tree.children[0]
    return isinstance(tree, Tree) and tree.data == "percent"


def same_percentage(a: str, b: str) -> bool:
    """50% is 0.5 and also 50."""
    if is_percentage(a) == is_percentage(b):
        return False
    left, right = (100, 1) if is_percentage(a) else (1, 100)
    pairs = list(values_at_points(a, b))
    return bool(pairs) and all(close(x * left, y * right) for x, y in pairs)


def proportional(pairs: list[tuple], sign: str) -> bool:
    """2y = 4x + 6 is y − 2x = 3; without symbols any number is a multiple of any other."""
    differences = [(x[1][0], y[1][0]) for x, y in pairs]
    u, v = differences[0]
    if len(pairs) < 2 or close(u, 0) or close(v, 0):
        return False
    return all(close(x * v, y * u) for x, y in differences) and (sign == "=" or u / v > 0)


def equal(a: str, b: str) -> bool:
    """Whether normalised `a` is right where normalised `b` is the reference."""
    names = re.findall(r"(?<![^,]) ?([a-zA-Z]) ?=", f"{a},{b}")
    if bool(re.search("[=<≤]", a)) != bool(re.search("[=<≤]", b)):  # each of a list
        a, b = (",".join(map(stated, [t] if re.search(r"[(\[]|begin", t) else t.split(","))) for t in (a, b))
    if names[1:] and names == sorted(set(names)):  # x=1,y=2 is (1,2): as the names, so the order
        a, b = f"({a})", f"({b})"
    (a, unit_a, known_a), (b, unit_b, known_b) = split_unit(a), split_unit(b)
    if unit_a != unit_b and (unit_a and unit_b or not known_a or not known_b):
        return False
    if not parse(a) or not parse(b):
        raise ValueError("not read")
    pairs = values_at_points(a, b)
    x, y = next(pairs)
    if type(x) is type(y) is tuple and x[0] == y[0] and x[0] in ("=", "<", "≤"):
        return proportional([(x, y), *pairs], x[0])
    if agree(x, y) and all(agree(x, y) for x, y in pairs):
        return True
    if type(x) is tuple or type(y) is tuple:
        return False
    symbols = parse(a)[1] | parse(b)[1]
    return same_percentage(a, b) or not symbols and is_rounding(b, x)


ERRORS = ValueError, ArithmeticError, TypeError, LookupError, RuntimeError, StopIteration, LarkError

# -- the verdict --------------------------------------------------------------------------------------------------

CHOICE = re.compile(r'"?\(?([A-E])(?:[).:]+(?!"? *(?:,|\([A-E]\)))"? *(.*)|"?)', re.IGNORECASE)
BESIDE = r"(?i)\b[a-e]\b|,(?![^(\[]*[)\]])"  # another letter, or an alternative outside of brackets
# Rather than a product of letters: quoted, or four letters, or three with a capital.
WORD = re.compile(r"""(?=.*("|[A-Za-z]{4}|[A-Z][A-Za-z]{2}))["A-Za-z .'-]+""")
LETTERS = re.compile(r"""[ "]*\(?[ "]*[A-Za-z](?:["A-Za-z .']|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2}))*\)?[ ".]*""")


def same_words(a: str, b: str) -> bool:
    """Words are compared with words, never with the letters of an expression: -y and \\text{y} differ."""
    if not (LETTERS.fullmatch(a) and LETTERS.fullmatch(b)):
        return False
    return re.sub(r"[^a-z]", "", a.lower()) == re.sub(r"[^a-z]", "", b.lower())


def same_choice(answer: str, letter: str, content: str | None) -> bool:
    """The letter, alone or with its content, or, where that is not known, with any one."""
    chosen = CHOICE.fullmatch(answer)
    same = bool(chosen) and chosen[1].upper() == letter
    return same and (not chosen[2] or is_equal(chosen[2], content or re.sub(BESIDE, "", chosen[2])))


def decide(answer: str, reference: str, choices: dict[str, str] | None = None) -> tuple[bool, str]:
    """The verdict, and how it was reached: by_number, by_string, by_value, or refused."""
    answer, reference = answer.strip(), reference.strip()
    if all(re.fullmatch(r"0|-?[1-9]\d*", text) for text in (answer, reference)):
        return answer == reference, "by_number"
    try:
        a, b = normalise(answer), normalise(reference)
        bare = {re.sub(r'(?<![\d ."])[ ."]+|[ ."]+(?![\d ."])', "", text) for text in (a, b)}
        if len(bare) == 1 and bare != {""}:
            return True, "by_string"
        if (option := CHOICE.fullmatch(b)) and option[1].isupper():
            if choices and not CHOICE.fullmatch(a):  # the content of this letter, and of no other
                return [key for key in choices if is_equal(answer, choices[key])] == [option[1]], "by_string"
            return same_choice(a, option[1], (choices or {}).get(option[1], option[2])), "by_string"
        if WORD.fullmatch(a) or WORD.fullmatch(b):
            return same_words(a, b), "by_string"
        return equal(a, b), "by_value"
    except ERRORS:
        return answer == reference != "", "refused"


def is_equal(answer: str, reference: str, choices: dict[str, str] | None = None) -> bool:
    """Whether a careful human grader would accept `answer` for `reference`. Deterministic, never raises."""
    return decide(answer, reference, choices)[0]


@functools.lru_cache(1024)
def how_read(text: str) -> str:
    """How a text can be read as an answer: "choice", "words", "value", or "" where it cannot."""
    try:
        text = normalise(text)
    except ValueError:
        return ""
    if CHOICE.fullmatch(text):
        return "choice"
    if WORD.fullmatch(text):
        return "words" if LETTERS.fullmatch(text) else ""
    if re.fullmatch(
        r"[\dA-F]+_\{-?\d+\}|\d?\d:[0-5]\d", text
    ):  # digits in a base and times are read as they are written
        return "value"
    try:
        return "value" if split_unit(text)[2] and equal(text, text) else ""
    except ERRORS:
        return ""
