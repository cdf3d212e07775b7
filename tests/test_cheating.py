"""The grader cannot be cheated: random strings against real references, and all pairs of different references.

Repairing single examples is not enough to pass these tests. Every string is drawn from a grammar that knows, without the
grader, which value the string states, if any; `plain_value` knows it for references that are plain numbers.
"""

import functools
import json
import random
import re
from fractions import Fraction
from math import factorial
from pathlib import Path

import pytest
from reward_pairs import PAIRS
from test_reward import DATA, FILES

import equality as grader

EQUAL_REFERENCES = Path(__file__).with_name("equal_references.txt")

# -- references ---------------------------------------------------------------------------------------------------


def labelled_numbers():
    """The references of the labelled pairs that are plain numbers, sorted. The others have many forms that are rare in
    ORZ's data, and what a random string may equal there is not known."""
    references = {pair[1].strip() for pairs in PAIRS.values() for pair in pairs if pair[1]}
    return sorted(reference for reference in references if plain_value(reference)[0] is not None)


@pytest.fixture
def orz_references(read_once):
    """The different reference answers of ORZ's data, sorted."""
    if not all((DATA / name).exists() for name in FILES):
        pytest.skip(f"ORZ's data is not in {DATA} (set ORZ_DATA)")
    records = [record for name in FILES for record in json.loads((DATA / name).read_text())]
    answers = [r["final_answer"] if isinstance(r, dict) else r[1]["ground_truth"]["value"] for r in records]
    return sorted({answer.strip() for answer in answers})


CACHED = "normalise without_punctuation read digits_needed value_at split_unit stated all_stated".split()


@pytest.fixture
def read_once(monkeypatch):
    """Every text is normalised and parsed once, however many pairs it is in."""
    for name in CACHED:
        monkeypatch.setattr(grader, name, functools.cache(getattr(grader, name).__wrapped__))


UNIT = r"\\(?:text|mbox) ?\{ ?[a-z]+ ?\}(?:\^\d)?|\^ ?\{?\\circ ?\}?|\\%|%"
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def plain_value(reference):
    """(value, decimal places) of a reference that is one number: 12, 0.5, 3/4, n = 7, 12 cm, 1,000. Else (None, 0)."""
    text = re.sub(
        r"\\[!,; ]|\\left|\\right|\s|\\\$|\$|\\dfrac",
        lambda m: r"\frac" if "dfrac" in m[0] else "",
        reference,
    )
    text = re.sub(rf"(?:{UNIT})$", "", text)
    text = re.sub(
        r"^(?:(?:[a-zA-Z]+|\\[a-z]+|\\frac\{[A-Z]+\}\{[A-Z]+\})(?:_[a-z])?(?:\([a-z](?:,[a-z])?\))?=)+",
        "",
        text,
    )
    if re.fullmatch(NUMBER, text):
        text = text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
        return (Fraction(text), len(text.partition(".")[2])) if "," not in text else (None, 0)
    match = re.fullmatch(r"(-?)(?:\\frac\{(-?\d+)\}\{(\d+)\}|\\frac(\d)(\d)|(\d+)/(\d+)|(\d+):(\d+))", text)
    is_time = re.fullmatch(r"\d?\d:[0-5]\d", text)
    if not match or is_time:
        return None, 0
    numerator, denominator = (int(part) for part in match.groups()[1:] if part)
    if denominator == 0:
        return None, 0
    return Fraction(numerator, denominator) * (-1 if match[1] else 1), 0


def words_of(text):
    """The letters of a text of words, and its minus signs; "" if it has digits or signs of mathematics."""
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname)(?![a-z])", "", text)
    text = re.sub(r"\\infty|∞", "infinity", text)
    text = re.sub(r"\\(?:left|right|quad|triangle|angle|displaystyle)(?![a-zA-Z])|\\[,;:! ]", "", text)
    if re.search(r"[\d\\=<>^_|/+*]", text):
        return ""
    return re.sub(r"[^a-z-]", "", text.lower())


# -- strings that state nothing -----------------------------------------------------------------------------------

WORDS = """yes no not even odd east west friday sunday true false none never always impossible cubed squared plus minus times half
    maybe wrong over root base negative about least most infinitely many result frac sqrt text mbox pi hundred
    times greater fewer or and if c x y n a b i e circles blue green ellipse history pauli oleg walter martin number solution""".split()
UNITS = "cm m km kg s seconds minutes hours dollars cents inches feet liters degrees apples people marbles square%cm cubic%feet".split()
BOXES = [
    r"\text{%s}",
    r"\mbox{%s}",
    r"\mathrm{%s}",
    r"\textbf{%s}",
    r"\operatorname{%s}",
    r"\mathbf{%s}",
    "%s",
]
COMMANDS = r"\frac \quad \, \; \! \left( \right) \cdot \times \sqrt \circ \cup \cap \% \$ \pm \le \ge \ne \approx \to \displaystyle".split()
PUNCTUATION = list(".,;:!?-+=<>()[]{}|/\\%$^_&*'~\"") + [
    " ",
    "  ",
    "{}",
    r"\{",
    r"\text{ }",
    r"\mbox{}",
    r"\ ",
]
INFINITIES = [r"\infty", r"-\infty", "∞", r"\text{infinity}", "infinity", r"+\infty"]


def word(rng):
    """A word of the list, or random letters."""
    if rng.random() < 0.6:
        return rng.choice(WORDS)
    return "".join(rng.choice("aeioubcdlmnprst") for _ in range(rng.randint(3, 8)))


def boxed_words(rng):
    text = " ".join(word(rng) for _ in range(rng.randint(1, 3)))
    return rng.choice(BOXES) % rng.choice([text, text.capitalize(), f" {text}"])


def without_value(rng):
    """Words, units, commands, punctuation, spaces and ∞, one to four of them side by side."""
    kinds = (
        boxed_words,
        lambda rng: rng.choice(BOXES[:3]) % rng.choice(UNITS).replace("%", " "),
        lambda rng: rng.choice(COMMANDS),
        lambda rng: rng.choice(PUNCTUATION),
        lambda rng: rng.choice(INFINITIES),
    )
    glue = rng.choice(["", " "])
    return glue.join(rng.choice(kinds)(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4))))


# -- strings that state a value -----------------------------------------------------------------------------------

NAMES = ["x = ", "n=", r"\text{Area} = ", "S_{ABC} = ", "AB = ", r"\alpha = ", r"r = "]
NO_NAMES = [
    r"\text{surely not } y = ",
    r"\infty = ",
    r"\not= ",
    r"\text{at least }",
    r"\text{not } x = ",
    "x < y = ",
    "2x = ",
]
RELATIONS = [
    r"x = \infty",
    r"x < \infty",
    r"\infty = 0",
    r"x > -\infty",
    r"x \le \infty",
    r"\infty < x",
    r"-\infty < x < \infty",
    "x = x",
    "0 = 1",
]


def number(rng):
    """A spelling of a number, and the number. Small ones, which most references are, come more often."""
    n = rng.choice((rng.randint(0, 12), rng.randint(0, 100), rng.randint(-1000, 3000)))
    d = rng.randint(1, 12)
    return rng.choice(
        (
            (f"{n}", Fraction(n)),
            (rf"\frac{{{n}}}{{{d}}}", Fraction(n, d)),
            (f"{n}/{d}", Fraction(n, d)),
            (f"{n}.0", Fraction(n)),
            (f"({n})", Fraction(n)),
            (f"{n}+{d}", Fraction(n + d)),
            (rf"{d} \cdot {d + 1}", Fraction(d * (d + 1))),
            (f"{d}^2", Fraction(d * d)),
            (f"{d}!", Fraction(factorial(d))),
        )
    )


def with_value(rng):
    """(string, the value that it states or None): a number with a name or a unit, or a string that only looks like
    one."""
    text, value = number(rng)
    kind = rng.randrange(12)
    if kind == 0:
        return text, value
    if kind == 1:
        return rng.choice(NAMES) + text, value
    if kind == 2:
        return text + rng.choice([r"\text{ %s}", r"\,\mathrm{%s}", r"\mbox{ %s}"]) % rng.choice(
            UNITS
        ).replace("%", " "), value
    if kind == 3:
        n, d = rng.randint(-20, 200), rng.randint(2, 9)
        return rng.choice(
            [
                (rf"{n}\%", Fraction(n, 100)),
                (rf"\frac{{{n}}}{{{d}}}\%", Fraction(n, 100 * d)),
                (rf"{n}+{d}\%", n + Fraction(d, 100)),
            ]
        )
    if kind == 4:
        return rng.choice(NO_NAMES) + text, None
    if kind == 5:  # an operation, a doubt or an unknown word is not a unit
        return text + rng.choice(
            [r"\text{ %s}", r" \mathrm{%s}", r"\mbox{ %s}"]
        ) % f"{word(rng)} {word(rng)}", None
    if kind == 6:  # a number with a symbol that no reference has
        suffix = rng.choice(
            [
                r"\mathrm{i}",
                r"\mathrm{e}^2",
                r" \zeta",
                r"\zeta_1",
                r"\zeta\%",
                r"\infty",
                r" \cdot \infty",
                r"+\infty",
                "!?",
                "..",
                "?",
            ]
        )
        return (text + suffix, None) if value != 0 else (text, value)
    if kind == 7:  # a number that runs into a word
        return text + r"\text{%s}" % rng.choice("zero one two five seven ten".split()), None
    if kind == 8 and value != 0:  # a word reference with a number beside it
        return rng.choice(["Friday", "Yes", r"\text{even}", "blue", "Oleg"]) + rng.choice(
            [" = ", " ", "", "-"]
        ) + text, None
    if kind == 9:
        return rng.choice(RELATIONS), None
    if kind == 10:
        n, exponent = rng.randint(1000, 6000), rng.randint(1000, 70000)
        return rng.choice(
            [f"{n}!+{value}", f"2^{{{exponent}}}+1", f"2^{{{exponent}}}-2^{{{exponent}}}+{text}+10^{{-{n}}}"]
        ), None
    return rf"{text} \text{{ or }} {number(rng)[0]}", None


# -- (a) Random strings -------------------------------------------------------------------------------------------


def is_same_value(value, text, reference):
    """Whether a plain reference has this value; a percent sign and the rounding of a decimal reference may differ."""
    other, places = plain_value(reference)
    if other is None or value is None:
        return False
    if value == other or (("%" in text) != ("%" in reference) and value * 100 in (other, other * 10000)):
        return True
    return places > 0 and abs(value - other) * 2 * 10**places <= 1


def find_wrong(strings, references):
    """(wrong answers that were accepted, accepted pairs whose reference is no plain number, which a person has to
    judge)."""
    wrong, unjudged = [], []
    for text, value in strings:
        for reference in references:
            if not grader.is_equal(text, reference) or text.strip() == reference:
                continue
            if value is None and words_of(text) != "" and words_of(text) == words_of(reference):
                continue
            if is_same_value(value, text, reference):
                continue
            is_plain = plain_value(reference)[0] is not None
            (wrong if value is None or is_plain else unjudged).append((text, reference))
    return wrong, unjudged


# The values, computed by hand, of references that are no plain numbers and whose value a random string may state.
JUDGED = {
    "8!": 40320,
    "2^{10} - 1 = 1023": 1023,
    "25 + 2 = 27": 27,
    "1" + "+1" * 10 + r"\times1" * 10: 11,
    r"\frac{1}{2}+\frac{1}{3}+\frac{1}{6}": 1,
    "101^2": 10201,
    r"2\times(11-5)+12": 24,
    r"3\times11\times61": 2013,
}


def check_strings(strings, references):
    wrong, unjudged = find_wrong(strings, references)
    assert wrong == []
    values = dict(strings)
    assert [pair for pair in unjudged if JUDGED.get(pair[1]) != values[pair[0]]] == []


def draw(count, seed):
    """Random strings; half of them state no value."""
    rng = random.Random(seed)
    return [(without_value(rng), None) if n % 2 else with_value(rng) for n in range(count)]


def test_no_string_is_right_for_another_number(read_once):
    """This test needs no data."""
    references = labelled_numbers()
    assert len(references) > 150
    check_strings(draw(200, seed=0), references)


def test_no_string_is_right_for_another_value(orz_references):
    """`\\mbox{ }` was once right for 3,798 of 5,238 real references: text without letters was equal to numbers."""
    check_strings(draw(200, seed=0), random.Random(0).sample(orz_references, 400))


@pytest.mark.soak
def test_no_string_is_right_for_another_value_of_all_references(orz_references):
    check_strings(draw(3000, seed=1), orz_references)


# -- (b) Different references -------------------------------------------------------------------------------------


def read_equal_references():
    """The pairs (answer, reference) that a person has read: "a ≡ b" in both directions, "a → b" in one."""
    pairs = set()
    for line in EQUAL_REFERENCES.read_text().splitlines():
        if line.startswith("#"):
            continue
        if " ≡ " in line:
            a, b = line.split(" ≡ ")
            pairs |= {(a, b), (b, a)}
        elif " → " in line:
            pairs.add(tuple(line.split(" → ")))
    return pairs


def find_equal(references):
    return {(a, b) for a in references for b in references if a != b and grader.is_equal(a, b)}


def test_different_references_are_equal_only_where_a_person_has_read_it(orz_references):
    """150 random references and all of one or two characters; all 4.3 million pairs are a long test."""
    sample = random.Random(0).sample(orz_references, 150)
    sample = sorted(set(sample) | {reference for reference in orz_references if len(reference) < 3})
    expected = {pair for pair in read_equal_references() if set(pair) <= set(sample)}
    assert find_equal(sample) == expected


@pytest.mark.soak
def test_all_different_references(orz_references):
    assert find_equal(orz_references) == read_equal_references()
