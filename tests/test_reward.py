"""The grader: labelled pairs, properties, real references, hostile answers, and the pool of processes."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reward_pairs import CHOICE_PAIRS, PAIRS

import equality
import reward

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ORZ_DATA", ROOT / "../shared/data"))
FILES = [
    "aime2024.json",
    "gpqa_diamond.json",
    "math500.json",
    "orz_math_57k_sample.json",
    "orz_math_72k_sample.json",
]
ALL_PAIRS = [pair for pairs in PAIRS.values() for pair in pairs]


def respond(answer):
    """A response with the format that the prompt asks for."""
    return f"Let me see. </think> <answer> The answer is \\boxed{{{answer}}} </answer>"


def children(pid):
    """The processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def graders(pid):
    """The grading processes of `pid`."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):  # the process may have ended meanwhile
            found += [child] if b"reward.py" in Path(f"/proc/{child}/cmdline").read_bytes() else []
    return found


def wait_until(condition, seconds):
    """Wait until the condition holds. The deadline only guards against hanging; it measures nothing."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "deadline"
        time.sleep(0.05)


# -- labelled pairs ----------------------------------------------------------------------------------------------


# Right answers that the grader rejects, by kind. It accepts no wrong one.
REJECTED = {"found later": [(r"\text{Yes, it is}", r"\text{Yes}")]}


@pytest.mark.parametrize("kind", PAIRS)
def test_labelled_pairs(kind):
    """A wrong answer that is accepted teaches a trick; a right answer that is rejected teaches the policy to avoid
    it."""
    wrong = [pair for pair in PAIRS[kind] if equality.is_equal(pair[0], pair[1]) is not pair[2]]
    assert [pair for pair in wrong if not pair[2]] == []
    assert {pair[:2] for pair in wrong} == set(REJECTED.get(kind, []))


def test_share_of_labels():
    """The share of all pairs, those with choices included, that are graded as labelled."""
    labels = [equality.is_equal(*pair[:-2]) == pair[-2] for pair in ALL_PAIRS + CHOICE_PAIRS]
    assert len(labels) == 879 and sum(labels) / len(labels) >= 0.995


# What the rules for sets in words, absolute values, sentences and units must reject and accept.
NEAR = [  # (answer, reference, label)
    ("(C) or (D) 12", "(C)", False),
    ("C, D 12", "(C)", False),
    ("C. 12 or 13", "C", False),
    ("C. (12, 13)", "C", True),
    ("(C) 12 (D) 13", "(C)", False),
    ("(D) 12", "(C)", False),
    ("Yes, no", "Yes", False),
    (r"\text{Yes, it is}", "No", False),
    ("no solution", r"\text{No solution}", True),
    ("yes. but not always", "yes", False),
    (r"|x|\le 1", "(-1,1)", False),
    (r"|x|\leq 1", "[-1,1]", True),
    ("|x|>1", "(-1,1)", False),
    (r"|x| < \frac{1}{2}", r"(-\frac12,\frac12)", True),
    (r"\{x \mid x\ge 2\}", r"(2,\infty)", False),
    (r"\{x : -1<x<3\}", "(-1,3)", True),
    ("f(x)=2x+2", "y=2x+1", False),
    ("f(x)=2x+1", "2x+1", True),
    (r"\text{all real numbers}", r"(0,\infty)", False),
    (r"\text{all real numbers except 0}", r"\mathbb{R}", False),
    (r"\mathbf{B}", "A", False),
    (r"10 \mathrm{~m} / \mathrm{s}", r"10\text{ km/h}", False),
    (r"10 \mathrm{~m} / \mathrm{s}", r"10\text{ m/s}", True),
    (r"10 \text{ m}/\text{s}^2", r"10 \text{ m/s}", False),
]


@pytest.mark.parametrize("answer, reference, label", NEAR)
def test_near_the_rules_found_last(answer, reference, label):
    """Fails if a rule that was made for one pair also accepts what is close to it."""
    assert equality.is_equal(answer, reference) == label


@pytest.mark.parametrize("pattern, replacement, example", equality.REWRITES)
def test_every_rewrite_does_what_its_example_says(pattern, replacement, example):
    """Fails if a rewrite rule has no example, or no longer does what its example says."""
    before, after = example.split(" → ")
    assert re.sub(pattern, replacement, before) == after != before


def test_longer_signs_come_first():
    """Fails if a sign stands before a longer one that begins with it, as \\cdot before \\cdots, and is read in its
    place."""
    signs = list(equality.SIGNS)
    assert not [(a, b) for n, a in enumerate(signs) for b in signs[n + 1 :] if b.startswith(a)]


def test_choices():
    """The content of a choice is as good as its letter only if the choices are known and no other letter has that
    content."""
    wrong = [pair for pair in CHOICE_PAIRS if equality.is_equal(pair[0], pair[1], pair[2]) != pair[3]]
    assert not wrong


def test_there_are_enough_pairs():
    """There are at least 400 pairs, none of them twice, and about half are near misses."""
    assert len(ALL_PAIRS) >= 400
    assert 0.4 < sum(not pair[2] for pair in ALL_PAIRS) / len(ALL_PAIRS) < 0.6
    assert len({pair[:2] for pair in ALL_PAIRS}) == len(ALL_PAIRS)


@pytest.mark.parametrize("words", ["trillion", "billion", "hundredths", "or less", "at least", "not"])
def test_bounds_and_magnitudes_are_no_units(words):
    """A unit may be missing on one side. Fails if a word that changes the value is ignored in the same way."""
    assert not equality.is_equal(rf"5 \text{{ {words}}}", "5")


@pytest.mark.parametrize("answer", [r"\sqrt{2} \approx 1.414", r"1.414 \approx \sqrt{2}", "5 = 6", "5 < 6"])
def test_equations_of_numbers_are_no_multiples(answer):
    """Any number is a multiple of any other one, so without symbols no equation or inequality may count as a multiple
    of another."""
    assert not equality.is_equal(answer, r"\frac{13}{12}\approx1.08")
    assert not equality.is_equal(answer, "1 = 3") and not equality.is_equal(answer, "1 < 3")


# Further pairs, by the rule that reads them: (reference, right answers, near misses), each separated by " | ".
VARIANTS = [
    (
        "(2,-3)",
        r"x=2, y=-3 | (x,y)=(2,-3) | \begin{cases}x=2\\y=-3\end{cases}",
        "(y,x)=(2,-3) | y=-3, x=2, z=1",
    ),
    ("2, -3", r"x_1=-3, x_2=2 | x=2 \text{ or } x=-3 | \alpha=2, \beta=-3", "x=-3, y=2 | x=2 | (2,-3)"),
    (
        r"(2,\infty)",
        r"\{x \in \mathbb{R} : x > 2\} | \{t \mid t > 2\}",
        r"\{x \in \mathbb{Z} : x > 2\} | x>2, x \in \mathbb{Z}",
    ),
    ("[-2,2]", r"|x| \leq 2 | \{x : |x| \le 2\}", r"|x| < 2 | |x| \ge 2 | |x| = 2"),
    (
        r"\mathbb{R}",
        r"\text{All real numbers}",
        r"\text{all real numbers except } 2 | \text{no real numbers}",
    ),
    (r"\emptyset", r"\varnothing | \{\}", r"\text{no} | 0 | \{0\}"),
    ("y=2x+1", "f(x)=2x+1 | f(x) = 1+2x", "f(x)=2x | f(x)=2x+1=y | f(y)=2y+1"),
    ("C", r"(C) 12 | \mathbf{(C)} | C. \frac{1}{2}", "(C) 12 or (D) 13 | (C), (D) | (C)(D) | C. D | (D) 12"),
    ("(A), (C)", "(C), (A)", "A | (A) | C"),
    (
        "5",
        r"5 \text{ m}/\text{s} | 5\ \text{m} \cdot \text{s}^{-1} | \text{Area} = 5 | x \approx 5",
        "x=5, y=6",
    ),
    (
        "5",
        r"\overline{AB} = 5 | x=y=5\text{ cm} | 5\ \Omega",
        r"5 \text{ (6)} | 5 \text{ maybe 6} | 5 \text{ 6}",
    ),
    (
        "5",
        r"5 \text{ people}",
        r"5 \text{ thousand people} | 5 \text{ million people} | 5 \text{ billion dollars}",
    ),
    (
        r"5 \text{ m/s}",
        r"5 \text{ m}/\text{s}",
        r"5 \text{ m} | 5 \text{ m}\cdot\text{s} | 5 \text{ m}/\text{s}^2",
    ),
    ("15", "15. | { 15 }", r"1. 5 | 1 .5 | 1\text{.}5 | 1 5 | 1\text{5}"),
    (r"\triangle ABC", r"ABC | \triangle A B C", r"\triangle ACB | \triangle ABD | \angle BCA"),
    (r"\pi", r"\pi \approx 3.14", r"3.14 | x \approx 3.14"),
]


@pytest.mark.parametrize("reference, right, wrong", VARIANTS)
def test_variants(reference, right, wrong):
    """Each rule, with what it must not accept: a hedge, a part, another order, a magnitude, or digits run together."""
    assert [answer for answer in right.split(" | ") if not equality.is_equal(answer, reference)] == []
    assert [answer for answer in wrong.split(" | ") if equality.is_equal(answer, reference)] == []


# -- extraction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"<answer> \boxed{5} </answer>", "5"),
        (r"<answer>\boxed{1} \boxed{2}</answer>", "2"),
        (r"<answer>\boxed{1}</answer> no: <answer>\boxed{2}</answer>", "2"),
        (r"<answer>\boxed{1}</answer> \boxed{2}", "1"),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", r"\frac{1}{2}"),
        (r"<answer>\boxed{\{1, 2\}}</answer>", r"\{1, 2\}"),
        (r"<answer>\boxed {5}</answer>", "5"),
        (r"<answer>{ \boxed{5}</answer>", "5"),
        (r"<answer>\boxed{5} and \boxed{6</answer>", "5"),
        (r"<answer> <answer>\boxed{5}</answer>", "5"),
        (r"<answer>\boxed{1}</answer> <answer>\boxed{2}", "1"),
        (r"<answer>\boxed{1}</answer> x </answer>", "1"),
        (r"\boxed{5}", ""),
        (r"<answer> 5 </answer>", ""),
        (r"</answer> \boxed{5} <answer>", ""),
        (r"<answer> \boxed{5}", ""),
        (r"<answer> \boxed{5 </answer>", ""),
        ("", ""),
    ],
)
def test_extract(response, answer):
    """The answer is the last balanced box inside the last complete answer block, and nothing else."""
    assert reward.extract_answer(response) == answer


def test_extraction_is_linear():
    """ORZ's regular expressions take cubic time if `</answer>` is missing: 20,000 open tags stop them."""
    start = time.process_time()
    for text in ("<answer>" * 20000, "<answer>" + r"\boxed{" * 20000 + "</answer>", "</answer>" * 20000):
        assert reward.extract_answer(text) == ""
    assert reward.extract_answer("<answer>" * 20000 + r"\boxed{5}</answer>" + "<answer>" * 20000) == "5"
    assert reward.extract_answer("<answer>" + "{" * 50000 + r"\boxed{5}" + "}" * 50000 + "</answer>") == "5"
    assert time.process_time() - start < 20  # quadratic time would be minutes


def test_grade():
    """ORZ's rule: a response is correct if its answer is right and it ended by itself."""
    grader = reward.Grader(1)
    assert grader.submit(respond("5"), "5").result()[0] is True
    assert grader.submit(respond("6"), "5").result()[0] is False
    assert grader.submit(respond("5"), "5", "length").result()[0] is False
    assert grader.submit(r"The answer is \boxed{5}", "5").result()[0] is False
    assert grader.submit(respond(""), "").result()[0] is False


# -- properties --------------------------------------------------------------------------------------------------

ATOMS = st.sampled_from(["2", "3", "7", "x", "y", r"\pi", r"\sqrt{2}", r"\frac{1}{3}", "n", r"\ln 5"])


@st.composite
def expressions(draw, depth=3):
    """Two spellings of one expression; the second has commuted, redundant or rewritten parts."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        atom = draw(ATOMS)
        other = {
            r"\frac{1}{3}": "1/3",
            r"\sqrt{2}": "2^{1/2}",
            "2": r"\frac{4}{2}",
            "x": r"\frac{3x}{3}",
        }.get(atom, atom)
        return atom, other
    (a, a2), (b, b2) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    kind = draw(st.sampled_from("+-*/^"))
    if kind == "+":
        return f"({a}) + ({b})", rf"\left({b2}\right)+\left({a2}\right)"
    if kind == "-":
        return f"({a}) - ({b})", f"-({b2}) + ({a2})"
    if kind == "*":
        return f"({a})({b})", rf"({b2}) \cdot ({a2})"
    if kind == "/":
        return rf"\frac{{{a}}}{{{b}}}", rf"({a2}) \cdot ({b2})^{{-1}}"
    return f"({a})^2", f"({a2})({a2})"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(expressions())
def test_rewritten_expressions_are_equal(pair):
    """Commuting, expanding and respelling an expression leaves it equal to itself."""
    values = [equality.read(equality.normalise(text)) for text in pair]
    assume(None not in values and list(equality.values_at_points(*values)))  # 1/(x − x) has no value
    assert equality.is_equal(*pair)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(expressions(), st.sampled_from(["+ 1", r"\cdot 2", "- x", "+ 10^{-30}", r"+ \sqrt{2}"]))
def test_perturbed_expressions_are_not_equal(pair, change):
    """A change of the value makes the answer wrong, however small it is."""
    assume(not (equality.is_equal(pair[1], "0") and "cdot" in change))
    assert not equality.is_equal(f"({pair[0]}) {change}", pair[1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions(a, b):
    """Two fractions are equal if and only if their values are, whatever their spelling."""
    text = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    assert equality.is_equal(text, f"{b.numerator}/{b.denominator}") == (a == b)
    assert equality.is_equal(text, f"{a.numerator}/{a.denominator}")
    assert equality.is_equal(rf"\frac{{{-3 * a.numerator}}}{{{-3 * a.denominator}}}", text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_order_matters_only_in_tuples(items, rng):
    """Sets are equal in any order, tuples only in their own, and a part of a set is never enough."""
    mixed = rng.sample(items, len(items))
    a, b = ", ".join(map(str, items)), ",".join(map(str, mixed))
    assert equality.is_equal(rf"\{{{a}\}}", rf"\{{{b}\}}")
    assert equality.is_equal(a, b)
    assert equality.is_equal(f"({a})", f"({b})") == (items == mixed)
    assert not equality.is_equal(", ".join(map(str, items[1:])), b)
    assert not equality.is_equal(a, str(items[0]))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.text(max_size=40) | st.text(r"\{}()[]^_,=<>|+-*/!%$.0123456789abcxyzn \"", max_size=40),
    st.sampled_from(["5", "x=2"]),
)
def test_any_text_has_a_verdict(text, reference):
    """No text makes the grader raise, and the same pair gets the same verdict twice."""
    for pair in (
        (text, reference),
        (reference, text),
        (r"\frac{" + text, reference),
        (r"\text{" + text + "}", text),
    ):
        assert equality.is_equal(*pair) is equality.is_equal(*pair)


# -- real references ---------------------------------------------------------------------------------------------

# References that are not computed, and so equal only to the same characters: a number too large to write out, one with a
# rounding of it, words without spaces, a stray quote; an equation that is always true or is not of numbers; gcd.
NOT_COMPUTED = {"3^{6567340}", r"\frac{13}{12}\approx1.08", "Anyintegervaluefrom0to45", "”"}
NOT_COMPUTED |= {" 25 + 2 = 27 ", " 2^{10} - 1 = 1023 ", "x = y = z = 1", "x = y = z = 3"}
NOT_COMPUTED |= {
    r" M = [2, \infty) ",
    " f(p, q) = pq ",
    " f(x, y) = 0 ",
    r" \gcd(m,n) = 1 ",
    r" n - \gcd(n, k) ",
}


@pytest.fixture(scope="module")
def references():
    """All reference answers of ORZ's data, in order."""
    if not all((DATA / name).exists() for name in FILES):
        pytest.skip(f"ORZ's data is not in {DATA} (set ORZ_DATA)")
    records = [record for name in FILES for record in json.loads((DATA / name).read_text())]
    return [r["final_answer"] if isinstance(r, dict) else r[1]["ground_truth"]["value"] for r in records]


def equal_without_strings(reference):
    """Whether a reference equals itself by its value. Choices, words, bases and times count as read, since they are
    compared as text."""
    text = equality.normalise(reference)
    if any(pattern.fullmatch(text) for pattern in (equality.WORDS, equality.CHOICE, equality.BASE_OR_TIME)):
        return True
    try:
        return equality.equal(text, text)
    except equality.ERRORS:
        return False


def test_every_reference_equals_itself(references):
    """A reference that cannot be read rejects every right answer that is spelled differently."""
    assert len(references) == 5238
    unique = sorted(set(references))
    assert {text for text in unique if not equal_without_strings(text)} == NOT_COMPUTED
    wrong = [
        text
        for text in unique
        for form in (text, rf"\boxed{{{text}}}", f"${text}$")
        if not equality.is_equal(form, text)
    ]
    assert wrong == []


def test_references_do_not_equal_others(references):
    """No reference that is a plain rational equals one of five others that are different rationals."""
    plain = {
        text: Fraction(text.strip())
        for text in set(references)
        if re.fullmatch(r" ?-?\d+(\.\d+|/\d+)? ?", text)
    }
    for text in set(references):
        if match := re.fullmatch(r" ?(-?)\\d?frac\{(\d+)\}\{(\d+)\} ?", text):
            plain[text] = Fraction(int(match[2]), int(match[3])) * (-1 if match[1] else 1)
    rng, pool = random.Random(0), sorted(plain)
    assert len(pool) > 900
    wrong = []
    for reference in (text for text in references if text in plain):
        for other in rng.sample(pool, 5):
            if plain[other] != plain[reference] and equality.is_equal(other, reference):
                wrong.append((other, reference))
    assert wrong == []


@pytest.mark.soak
def test_references_against_all_kinds(references):
    """Of five random other references for each, only those are equal whose normalised numbers are (`n = 7` for `7`),
    and a few others, which a person has read."""
    rng = random.Random(0)
    found = {
        (o, r)
        for r in references
        for o in rng.sample(references, 5)
        if o.strip() != r.strip() and equality.is_equal(o, r)
    }
    strip = re.compile(r"[a-zA-Z]+|[\\${}()= ^:]|(?<=\\)frac")
    odd = {pair for pair in found if len({strip.sub("", text) for text in pair}) > 1}
    assert len(found) < 40 and len(odd) < 10


# -- hostile answers ---------------------------------------------------------------------------------------------

TOWER = "9" + "^{9" * 50 + "}" * 50
HOSTILE = [
    TOWER,
    "9^{9^{9^{9}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "9^9^9^9^9",
    "10^{10^{10}}",
    "10^{-10^{10}}",
    "(10^{1000})^{1000000}",
    "e^{e^{e^{e^{e^e}}}}",
    "1e999999999",
    "1e9999",
    "factorial(10**9)",
    "(10^9)!",
    "1000000000!",
    "((20!)!)!",
    "9!!!!!!!!",
    "99999!" * 50,
    r"\binom{10^{12}}{5 \cdot 10^{11}}",
    r"\binom{20000}{10000}^{20000}",
    r"\gcd(10^{100000}, 3)",
    r"\sin(10^{100000})",
    r"\sin " * 200 + "1",
    r"\sqrt{" * 300 + "2" + "}" * 300,
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    "{" * 10000 + "5" + "}" * 10000,
    "(" * 10000 + "5" + ")" * 10000,
    "(" * 400 + "5" + ")" * 400,
    "[" * 400 + "5" + "]" * 400,
    r"\{" * 200 + "5" + r"\}" * 200,
    "{" * 10000,
    "}" * 10000,
    "(" * 900,
    ")" * 900,
    "[" * 900,
    "|" * 900,
    "-" * 901 + "5",
    "+" * 900 + "6",
    "^" * 900,
    "_" * 900,
    "!" * 900,
    "$" * 900,
    "%" * 900,
    "\\" * 900,
    "=" * 900,
    "<" * 900,
    "x<" * 300 + "5",
    "5=" * 400 + "6",
    "a=b," * 200,
    "1," * 450 + "5",
    "5 5 " * 220,
    "9" * 100000,
    "x" * 100000,
    "1+" * 50000 + "1",
    " " * 100000 + "6",
    "\n" * 1000 + "6",
    r"\frac" * 150,
    r"\sqrt" * 150,
    r"\text{" * 150,
    r"\text{5" * 100 + "}" * 100,
    r"\boxed{" * 100 + "5" + "}" * 99,
    r"\begin{pmatrix}" * 60,
    r"\begin{pmatrix}" + "1&" * 400 + r"1\end{pmatrix}",
    r"\begin{pmatrix}" + r"1\\" * 300 + r"1\end{pmatrix}",
    r"\end{pmatrix}" * 60,
    r"\left(" * 100,
    r"\pm 1" * 100,
    r"\pm 1," * 100,
    r"\overline{" * 100,
    "0." + r"\overline{3}" * 70,
    r"\sum_{n=1}^{\infty} \frac{1}{n^{n^n}}",
    r"\sum_{k=0}^{10^{18}} k^k",
    r"\prod_{p} (1 - p^{-s})^{-1}",
    r"\int_0^{\infty} e^{-x^{x^x}} dx",
    r"\int \int \int \int \sin(\sin(\sin x)) dx",
    r"\lim_{n \to \infty} n^{n^n}",
    "x^{x^{x^{x^{x^{x}}}}}",
    "(x+1)^{100000}",
    "(x+y+z+w)^{5000}",
    r"\tan(\tan(\tan(\tan(x))))^{1000}",
    "__import__('os').system('touch /tmp/pwned')",
    "exec('while True: pass')",
    "eval('5')",
    "lambda: 5",
    "{__class__}",
    "5\x00",
    "\x005",
    "5\u202e",
    "\u202e5",
    "\u200f5\u200e",
    "5\u200b6",
    "\ufeff5",
    "5\ud800",
    "5\x1b[2J",
    "\uffff5",
    "٥5",
    "5" + "\u0301" * 500,
    "😀" * 200,
    r"\input{/etc/passwd}",
    r"\def\x{\x}\x",
    "%s%s%s%n",
    "'; DROP TABLE rewards; --",
    "nan",
    "inf",
    r"\infty - \infty",
    r"\frac{0}{0}",
    r"0^{0^{-1}}",
    "5 or 6",
    "5 \\text{ or } 6",
]


def test_hostile_answers():
    """One answer that hangs, exhausts memory or crashes would stop 128 GPUs. Here it is wrong, and the next one is
    graded."""
    assert len(HOSTILE) >= 80
    grader = reward.Grader(2)
    assert grader.submit(respond("5"), "5.0").result(60) == RIGHT
    futures = []
    for answer in HOSTILE:
        box = answer if answer.count("{") != answer.count("}") else r"\boxed{" + answer + "}"
        futures.append(grader.submit(f"</think><answer>{box}</answer>", "5"))
        futures.append(grader.submit(respond("5"), "5.0"))
    rewards, outcomes = zip(*(future.result(300) for future in futures))
    peaks = [
        int(re.search(r"VmPeak:\s+(\d+)", Path(f"/proc/{p}/status").read_text())[1])
        for p in graders(os.getpid())
    ]
    assert [answer for answer, value in zip(HOSTILE, rewards[::2], strict=True) if value] == []
    assert set(rewards[1::2]) == {True}
    assert set(outcomes[1::2]) == {"by_value"} and not {"backstop", "crashed"} & set(outcomes)
    assert max(peaks) * 1024 <= reward.MEMORY_BYTES
    del grader  # its processes end with it
    wait_until(lambda: not graders(os.getpid()), 30)


@pytest.mark.parametrize("answer", [answer for answer in HOSTILE if len(answer) < 2000])
def test_hostile_answers_are_refused_cheaply(answer):
    """is_equal never raises, and refuses such work before it starts; the limits of the process are only a second
    safeguard."""
    start = time.process_time()
    assert equality.is_equal(answer, "5") is False
    assert time.process_time() - start < 20


# -- the pool ----------------------------------------------------------------------------------------------------

# Each term is within the limits; all together take minutes.
SLOW = "+".join(f"√{{{n}!}}" for n in range(19910, 20000))
RIGHT = (True, "by_value")


def test_pool_agrees_with_direct_calls():
    """Verdicts must not depend on how many answers are graded at once: when the clock started at submission, 432 of
    1,021 right answers were lost."""
    pairs = [pair for pair in ALL_PAIRS if pair[0] and reward.extract_answer(respond(pair[0])) == pair[0]]
    assert len(pairs) > 0.98 * len(ALL_PAIRS)
    grader = reward.Grader(2)
    futures = [grader.submit(respond(pair[0]), pair[1]) for pair in pairs]
    futures += [grader.submit(respond(p[0]), p[1], "stop", p[2]) for p in CHOICE_PAIRS]
    rewards, outcomes = zip(*(future.result(300) for future in futures))
    labels = [float(pair[2] and pair[:2] not in sum(REJECTED.values(), [])) for pair in pairs]
    assert [*rewards] == labels + [float(pair[3]) for pair in CHOICE_PAIRS]
    assert {*outcomes} == {"by_number", "by_string", "by_value", "refused"}


def test_slow_item_is_killed_and_counted(monkeypatch):
    """An item that takes more than 2 s of the process's CPU time is counted, and its process is replaced; the items
    behind it are graded as usual."""
    grader = reward.Grader(1)
    futures = [grader.submit(respond(answer), "5") for answer in (SLOW, "5.0", "5", "6")]
    results = [future.result(300) for future in futures]
    assert results == [(False, "timed_out"), RIGHT, (True, "by_number"), (False, "by_number")]


def test_stopped_process_meets_the_backstop(monkeypatch):
    """A process that gets no CPU time never reaches its CPU limit, so a limit on wall time must end it."""
    grader = reward.Grader(1)
    assert grader.submit(respond("6"), "5").result(60) == (False, "by_number")  # it has started
    monkeypatch.setattr(reward, "WALL_SECONDS", 1.0)
    os.kill(graders(os.getpid())[0], signal.SIGSTOP)
    assert grader.submit(respond("5.0"), "5").result(60) == (False, "backstop")
    monkeypatch.setattr(reward, "WALL_SECONDS", 60.0)
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT


def test_killed_process_is_replaced():
    """A process that is killed, as the kernel does when memory runs out, is replaced, whether it is idle or in the
    middle of an item."""
    grader = reward.Grader(1)
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT
    os.kill(graders(os.getpid())[0], signal.SIGKILL)
    wait_until(lambda: not graders(os.getpid()), 30)
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT
    process = graders(os.getpid())[0]
    os.kill(process, signal.SIGSTOP)  # so that it is in the middle of the item, however fast it is
    future = grader.submit(respond("5.0"), "5")
    time.sleep(0.3)
    os.kill(process, signal.SIGKILL)
    assert future.result(60) == RIGHT  # graded by another process
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT


def test_item_that_is_killed_twice_is_counted():
    """An item whose process is killed is tried once more, and not for ever: perhaps the item causes it."""
    grader = reward.Grader(1)
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT
    first = graders(os.getpid())
    future = grader.submit(respond(SLOW), "5")
    time.sleep(0.3)
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: set(graders(os.getpid())) - set(first), 30)
    os.kill((set(graders(os.getpid())) - set(first)).pop(), signal.SIGKILL)
    assert future.result(60) == (False, "crashed")
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT


def test_ctrl_c_does_not_reach_processes():
    """Ctrl-C reaches the whole foreground process group. The grading processes must not be in it, so that the step in
    progress can still be graded."""
    grader = reward.Grader(1)
    assert grader.submit(respond("5.0"), "5").result(60) == RIGHT
    assert os.getpgid(graders(os.getpid())[0]) != os.getpgid(0)


def test_processes_die_with_a_killed_parent():
    """`kill -9` of the run must leave no grading process behind, neither a busy nor an idle one."""
    script = "import reward, time; g = reward.Grader(2); a = [g.submit(%r, '5'), g.submit(%r, '5')];"
    script = script % (respond("6"), respond(SLOW)) + "print(a[0].result()[0], flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"False\n"
    pids = graders(parent.pid)
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)


def test_cut_off_responses_and_missing_answers_are_counted():
    """Responses that were cut off and those without an answer have outcomes of their own in the metrics, and need no
    process."""
    grader = reward.Grader(1)
    assert grader.submit(respond("5"), "5", "length").result() == (False, "cut_off")
    assert grader.submit("no answer", "5").result() == (False, "no_answer")
    assert grader.submit(respond("5"), "5", finish_reason="stop").result() == (True, "by_number")


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\frac{1}{2}", (True, "value")),
        ("x = 5", (True, "value")),
        (r"2^{10} - 1 = 1023", (True, "value")),
        (r"x^2 + y^2 = 4", (True, "value")),
        (r"\text{not } x = 5", (False, "unread")),
        ("[2, 3)", (True, "value")),
        ("11:50", (True, "value")),
        ("52_8", (True, "value")),
        (r"\text{east}", (True, "words")),
        ("(C)", (True, "choice")),
        (r"\mbox{ }", (False, "unread")),
        ("", (False, "unread")),
        (r"5 \text{ flurbs}", (False, "unread")),
        ("Anyintegervaluefrom0to45", (False, "unread")),
        ("(" * 900, (False, "unread")),
    ],
)
def test_readable(text, expected):
    """How a reference is read: by its value, as words, as a choice, or not at all. One that cannot be read would
    reject every right answer that is spelled differently."""
    assert reward.Grader(1).readable(text).result(60) == expected


def test_import_is_light():
    """The driver imports reward.py before it knows whether there is a GPU; only the grading processes import what
    reads mathematics."""
    heavy = ("torch", "ray", "vllm", "numpy", "equality", "lark", "mpmath", "sympy")
    script = f"import sys, reward; print([module for module in {heavy} if module in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True) == "[]\n"


def test_other_precision_is_left_alone():
    """mpmath's precision is global: grading must leave it as it was."""
    import mpmath

    before = mpmath.mp.prec
    assert equality.is_equal(r"\sqrt{8}", r"2\sqrt{2}") and not equality.is_equal("1/3", "0.34")
    assert mpmath.mp.prec == before


@pytest.mark.soak
def test_verdicts_under_load():
    """Verdicts are the same while other processes keep all cores busy."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        test_pool_agrees_with_direct_calls()
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


# -- statistics --------------------------------------------------------------------------------------------------


def test_response_stats():
    """The five words that ORZ counts, the format, and repetition, which is between 0 and 1."""
    stats = reward.response_stats(
        "Wait, wait, let me recheck this. However, retry. </think> <answer> 5 </answer>"
    )
    assert stats == {
        "wait": 2.0,
        "recheck": 1.0,
        "retry": 1.0,
        "alternatively": 0.0,
        "however": 1.0,
        "think_format": 1.0,
        "repetition": 0.0,
    }
    assert reward.response_stats("<answer> </think> </answer>")["think_format"] == 0.0
    assert reward.response_stats("the same again and again " * 100)["repetition"] > 0.9
    assert reward.response_stats(" ".join(map(str, range(1000))))["repetition"] == 0.0
    assert reward.response_stats("")["repetition"] == 0.0
