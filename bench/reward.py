"""Accuracy and speed of the grader, beside ORZ's rules and math-verify, on the labelled pairs of tests/.

    pip install --target /tmp/mv --no-deps math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
    PYTHONPATH=/tmp/mv python bench/reward.py [--data DIR]    prints tables and writes bench/results/reward.json

math-verify and its parser stand in a folder of their own, so that no run can import them.

The author of the grader wrote the pairs for this project, before the grader, as its specification. So this grader's own
score only says how well it does what was specified. The scores of the other two systems can be compared with each other;
they were not made to this specification.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import re
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_cheating  # noqa: E402
from math_verify import parse, verify  # noqa: E402
from reward_pairs import PAIRS  # noqa: E402
from sympy.parsing.latex import _parse_latex_antlr  # noqa: E402

import equality  # noqa: E402
import reward  # noqa: E402

LIMIT = 5.0  # CPU seconds a pair may take in any system; then it counts as False, and as timed out
FILES = ["aime2024", "gpqa_diamond", "math500", "orz_math_57k_sample", "orz_math_72k_sample"]


# -- ORZ's rules, restated: string rules of MATH and Minerva, then sympy's parse_latex and evalf ------------------

ORZ_REMOVED = (
    "square|ways|integers|dollars|mph|inches|ft|hours|km|units|points|feet|minutes|digits|cents|degrees|cm|gm"
)
ORZ_REMOVED += (
    r"|pounds|meters|meals|edges|students|multiples|\\ldots|\\%|%|\\text\{s\}|\\text\{\}|°|\^\\circ|\\!|\\,"
)


def orz_normalise(text):
    """Remove delimiters, words, units, spaces and the commas of plain numbers; put braces into fractions and roots."""
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{(.*?)\}", r"\1", text.split("=")[-1])
    text = re.sub(r"\\boxed\{(.*)\}|\$", r"\1", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = re.sub(rf"\b(?:an?|and|or)\b|{ORZ_REMOVED}|\\left|\\right|\\ |\s", "", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{\[])", r"sqrt{\1}", text).rstrip(".")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text


def sympy_latex(text):
    """sympy's parser. It was generated for antlr 4.11 and would refuse the installed 4.13, whose format is the same: so it
    is told that 4.11 is installed, and its warnings are not printed."""
    _parse_latex_antlr.version = lambda name: "4.11"
    with contextlib.redirect_stdout(io.StringIO()):
        return _parse_latex_antlr.parse_latex(text)


def orz_value(text):
    tree = sympy_latex(text)
    return tree, tree.evalf()


def orz(answer, reference):
    """Equal as normalised strings, or as sympy expressions or their float values, plain or normalised."""
    normalised = orz_normalise(answer), orz_normalise(reference)
    if normalised[0] == normalised[1]:
        return True
    for a, b in ((answer, reference), normalised):
        try:
            (tree, value), (other_tree, other_value) = orz_value(a), orz_value(b)
            if tree == other_tree or value == other_value:
                return True
        except TimeoutError:
            raise
        except Exception:  # noqa: BLE001 as ORZ does
            continue
    return False


def math_verify(answer, reference):
    """math-verify, used as its documentation says: both as LaTeX in math mode, the reference first."""
    gold, mine = (parse(text if "$" in text else f"${text}$") for text in (reference, answer))
    return verify(gold, mine)


def forget():
    """Empty the caches of equality.py. A grading process remembers what it has read; a new text takes longer."""
    for function in vars(equality).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def decide_anew(answer, reference):
    forget()
    return equality.decide(answer, reference)


def this(answer, reference):
    return decide_anew(answer, reference)[0]


SYSTEMS = {"this": this, "math-verify": math_verify, "orz": orz}


# -- measurement -------------------------------------------------------------------------------------------------


def expire(*_):
    raise TimeoutError


def limited(function, *arguments, repeats=3):
    """(result, milliseconds of the fastest of a few runs). The result is None where the function took too long or raised."""
    times = []
    for _ in range(repeats):
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        start = time.perf_counter()
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 another system's failure is a False
            result = None
            if isinstance(error, TimeoutError):
                return None, LIMIT * 1e3
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        times.append((time.perf_counter() - start) * 1e3)
    return result, min(times)


def milliseconds(times):
    times = sorted(times)
    return {
        "median_ms": round(statistics.median(times), 4),
        "p99_ms": round(times[int(0.99 * (len(times) - 1))], 3),
        "max_ms": round(times[-1], 1),
        "pairs_per_second_per_core": round(1e3 * len(times) / sum(times)),
    }


def judge(function):
    """Agreement of a system with the labels, in all and by kind."""
    kinds, times, expired = {}, [], 0
    for kind, pairs in PAIRS.items():
        accepts = rejects = 0
        for answer, reference, label, _ in pairs:
            verdict, ms = limited(function, answer, reference)
            times.append(ms)
            expired += ms >= LIMIT * 1e3
            accepts += bool(verdict) and not label
            rejects += not verdict and label
        kinds[kind] = {"pairs": len(pairs), "wrong_accepts": accepts, "wrong_rejects": rejects}
    total = {
        key: sum(kind[key] for kind in kinds.values()) for key in ("pairs", "wrong_accepts", "wrong_rejects")
    }
    right = 1 - (total["wrong_accepts"] + total["wrong_rejects"]) / total["pairs"]
    return total | {"right": round(right, 4), "timed_out": expired} | milliseconds(times) | {"kinds": kinds}


def wrong(row):
    return row["wrong_accepts"] + row["wrong_rejects"]


def by_stage():
    """Times of this grader by the stage that decides."""
    times = {}
    for pair in (pair for pairs in PAIRS.values() for pair in pairs):
        (_, stage), ms = limited(decide_anew, pair[0], pair[1])
        times.setdefault(stage, []).append(ms)
    times["string or number"] = times["by_string"] + times["by_number"]
    return {stage: milliseconds(values) for stage, values in sorted(times.items())}


def parsers(references):
    """How many references each parser reads at all, and how long it takes: the reason why only this project's is used."""
    from latex2sympy2_extended import latex2sympy

    def own(text):
        forget()
        text = equality.normalise(text)
        if equality.WORDS.fullmatch(text) or equality.CHOICE.fullmatch(text):
            return True
        return bool(re.fullmatch(r"\d+_\{-?\d+\}|\d?\d:[0-5]\d", text)) or equality.equal(text, text)

    readers = {"this": own, "latex2sympy2_extended": latex2sympy, "sympy.parse_latex": sympy_latex}
    results = {}
    for name, reader in readers.items():
        outcomes = [limited(reader, text) for text in references]
        read = sum(result not in (None, [], False) for result, _ in outcomes)
        results[name] = {"references": len(references), "read": read} | milliseconds(
            [ms for _, ms in outcomes]
        )
    return results


def constant_answers(references):
    """The reward of a policy that gives the same answer to all questions: the best of 100 strings.

    Half of them state no value and are no reference: they must earn nothing. The others are the most frequent
    references: one earns the share of the references that have its value.
    """
    rng = random.Random(0)
    counts = Counter(reference.strip() for reference in references)
    strings = [r"\mbox{ }", r"\mathrm{-}", r"\text{frac}", r"x=\infty", r"x<\infty"]
    strings = (strings + [test_cheating.without_value(rng) for _ in range(300)])[:300]
    strings = [text for text in strings if text.strip() not in counts][:50]

    def earned(answer):
        return sum(n for reference, n in counts.items() if equality.is_equal(answer, reference)) / len(
            references
        )

    nothing = {text: earned(text) for text in strings}
    something = {text: earned(text) for text, _ in counts.most_common(50)}
    best = max(something, key=something.get)
    values = {text: test_cheating.plain_value(text)[0] for text in counts}
    same = sum(n for text, n in counts.items() if text == best or values[text] == values[best] is not None)
    return {
        "no_reference_best": max(nothing.values()),
        "no_reference_answer": max(nothing, key=nothing.get),
        "reference_best": round(something[best], 4),
        "reference_answer": best,
        "same_value_share": round(same / len(references), 4),
    }


def many_different(count=60000):
    """Resident memory of one process that decides many different answers. It must not grow: the caches are bounded."""
    rng = random.Random(0)
    spellings = [
        lambda: rf"\frac{{{rng.randint(1, 10**6)}}}{{{rng.randint(1, 10**6)}}}",
        lambda: rf"{rng.randint(1, 10**6)}\sqrt{{{rng.randint(2, 10**5)}}}",
        lambda: f"x^{{{rng.randint(2, 50)}}}+{rng.randint(1, 10**6)}n",
        lambda: f"({rng.randint(1, 10**4)}, {rng.randint(1, 10**4)}]",
        lambda: rf"\text{{w{rng.randint(1, 10**6)}}}",
    ]
    resident = {}
    for n in range(1, count + 1):
        equality.decide(rng.choice(spellings)(), rng.choice(spellings)())
        if n in (count // 6, count // 3, count // 2, count):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[n] = round(pages * resource.getpagesize() / 2**20, 1)
    return {"resident_mib_after": resident}


def alone_and_in_a_batch(count=1024):
    """How many verdicts differ between a request alone and the same request among many; it must be 0."""
    rng = random.Random(0)
    balanced = [
        p[:2] for pairs in PAIRS.values() for p in pairs if p[0] and p[0].count("{") == p[0].count("}")
    ]
    pairs = rng.choices([pair for pair in balanced if not pair[0].endswith("\\")], k=count)
    grader = reward.Grader(2)
    futures = [
        grader.submit(f"<answer>\\boxed{{{answer}}}</answer>", reference) for answer, reference in pairs
    ]
    differing = sum(future.result()[0] != equality.is_equal(*pair) for future, pair in zip(futures, pairs))
    return {"pairs": count, "differing": differing}


def throughput(references, count=8192, processes=2):
    """A step's worth of responses through the Grader. Their answers are the reference as written (half), the reference
    between spaces (a quarter) and any reference (a quarter)."""
    rng = random.Random(0)
    filler = "Let me think about this step by step. Wait, I should recheck the sum of the digits. " * 60
    items = []
    for _ in range(count):
        reference = rng.choice(references)
        answer = rng.choice([reference, reference, f" {reference} ", rng.choice(references)])
        items.append((f"{filler}</think> <answer> \\boxed{{{answer}}} </answer>", reference))
    start = time.process_time()
    for response, _ in items:
        reward.response_stats(response)
    stats_seconds = time.process_time() - start
    grader = reward.Grader(processes)
    for _ in range(4 * processes):  # the processes start
        grader.submit(items[0][0], "0.5").result()
    before, cpu = time.monotonic(), os.times()
    futures = [grader.submit(*item) for item in items]
    rewards, outcomes = zip(*(future.result() for future in futures))
    seconds = time.monotonic() - before
    own_cpu = os.times().user + os.times().system - cpu.user - cpu.system
    for process in filter(None, grader.idle):
        process.communicate()  # The process ends when its input does; only then RUSAGE_CHILDREN includes it.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "responses": count,
        "characters_each": len(items[0][0]),
        "processes": processes,
        "seconds": round(seconds, 2),
        "parent_cpu_seconds": round(own_cpu, 2),
        "graders_cpu_seconds": round(children.ru_utime + children.ru_stime, 2),
        "right": int(sum(rewards)),
        "stats": Counter(outcomes),
        "response_stats_cpu_seconds": round(stats_seconds, 2),
        "load_average": os.getloadavg()[0],
    }


def read_references(folder):
    records = [record for name in FILES for record in json.loads((folder / f"{name}.json").read_text())]
    return [r["final_answer"] if isinstance(r, dict) else r[1]["ground_truth"]["value"] for r in records]


def main():
    options = argparse.ArgumentParser()
    options.add_argument(
        "--data", type=Path, default=Path(os.environ.get("ORZ_DATA", ROOT / "../shared/data"))
    )
    folder = options.parse_args().data
    signal.signal(signal.SIGPROF, expire)
    references = [pair[1] for pairs in PAIRS.values() for pair in pairs if pair[1]]
    if (folder / "math500.json").exists():
        references = read_references(folder)
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    packages = ("lark", "mpmath", "sympy", "math-verify", "latex2sympy2_extended", "antlr4-python3-runtime")
    report = {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "shared": True, "load_average": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "pairs": {name: judge(system) for name, system in SYSTEMS.items()},
        "by_stage": by_stage(),
        "parsers": parsers(sorted(set(references))),
        "constant_answers": constant_answers(references),
        "many_different": many_different(),
        "alone_and_in_a_batch": alone_and_in_a_batch(),
        "throughput": throughput(references),
    }
    (ROOT / "bench/results").mkdir(exist_ok=True)
    (ROOT / "bench/results/reward.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, row in report["pairs"].items():
        print(f"{name:12}", {key: value for key, value in row.items() if key != "kinds"})
    print(f"\n{'right, by kind':28}" + "".join(f"{name:>14}" for name in SYSTEMS))
    for kind, pairs in PAIRS.items():
        shares = [1 - wrong(report["pairs"][name]["kinds"][kind]) / len(pairs) for name in SYSTEMS]
        print(f"{kind:28}" + "".join(f"{share:14.1%}" for share in shares))
    for part in (
        "by_stage",
        "parsers",
        "constant_answers",
        "many_different",
        "alone_and_in_a_batch",
        "throughput",
    ):
        print(part, json.dumps(report[part], indent=1))


if __name__ == "__main__":
    main()
