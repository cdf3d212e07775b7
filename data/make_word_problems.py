"""Make data/word_problems, arithmetic in words for a small language model: python data/make_word_problems.py

In:   nothing but the tables below.
Out:  JSON lines {"question", "answer", "kind"}, the same on every machine:
      train.jsonl          what PPO trains on
      eval.jsonl           the wordings of train.jsonl, with numbers that it does not use
      eval_wordings.jsonl  wordings and numbers that train.jsonl does not use

Every kind of problem is a formula with six wordings, of which two are held out. A hash of a question's two numbers, which
depends neither on their order nor on the kind, decides whether they are held out.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

OUT = Path(__file__).resolve().parent / "word_problems"
NUM_TRAIN, NUM_EVAL, SEED = 2048, 128, 1  # questions; NUM_EVAL in each of the two held-out files
HELD_OUT = 4  # about one pair of numbers in four
SHOWN = (5, 12)  # answers of the examples in configs/smollm2_135m.py: copying one is never right

NAMES = (
    "Ann Ben Carl Dana Emma Fred Grace Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
)
THINGS = "apples books cards coins cookies eggs flowers marbles pencils shells stamps stickers".split()

# kind: (formula, numbers from … to … for a and b, wordings of train.jsonl and eval.jsonl, wordings held out)
KINDS = {
    "add": (
        lambda a, b: a + b,
        [(2, 15), (2, 12)],
        [
            "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
            "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} find in total?",
            "There are {a} {things} on the table. {name} adds {b} more. How many {things} are on the table?",
            "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        ],
        [
            "A box holds {a} {things}. {name} puts in another {b}. How many {things} does the box hold then?",
            "{name} bought {a} {things} in one shop and {b} in the next. How many {things} did {name} buy altogether?",
        ],
    ),
    "subtract": (
        lambda a, b: a - b,
        [(9, 20), (2, 8)],
        [
            "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have left?",
            "There were {a} {things} in a box. {name} took {b} out. How many {things} are still in the box?",
            "{name} has {a} {things}. {b} of them get lost. How many {things} remain?",
            "{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?",
        ],
        [
            "{name} made {a} {things} and sold {b} of them. How many {things} were not sold?",
            "Of {a} {things} on a shelf, {name} takes {b} away. How many {things} stay on the shelf?",
        ],
    ),
    "multiply": (
        lambda a, b: a * b,
        [(2, 9), (2, 9)],
        [
            "{name} has {a} boxes with {b} {things} in each. How many {things} does {name} have?",
            "There are {a} tables with {b} {things} on each table. How many {things} are there in total?",
            "{name} buys {b} {things} every day for {a} days. How many {things} does {name} buy?",
            "Each of {a} children brings {b} {things}. How many {things} do the children bring?",
        ],
        [
            "{name} fills {a} bags and puts {b} {things} into every bag. How many {things} are in the bags?",
            "One pack holds {b} {things}. {name} opens {a} packs. How many {things} does {name} get?",
        ],
    ),
}


def held_out(values):
    """Whether a pair of numbers is for evaluation."""
    digest = hashlib.sha256(",".join(map(str, sorted(values))).encode()).digest()
    return digest[0] % HELD_OUT == 0


def problem(kind, wording, values, rng):
    """One question with its answer."""
    name, other = rng.sample(NAMES, 2)
    words = dict(zip("ab", values), name=name, other=other, things=rng.choice(THINGS))
    return {"question": wording.format(**words), "answer": str(KINDS[kind][0](*values)), "kind": kind}


def problems(count, wordings, for_eval, seed):
    """`count` different questions, the kinds and their wordings in turn. wordings: 0 = seen, 1 = held out."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        kind = list(KINDS)[len(rows) % len(KINDS)]
        choices = KINDS[kind][2 + wordings]
        values = [rng.randint(low, high) for low, high in KINDS[kind][1]]
        if held_out(values) != for_eval or KINDS[kind][0](*values) in SHOWN:
            continue
        row = problem(kind, choices[len(rows) // len(KINDS) % len(choices)], values, rng)
        if row["question"] not in seen:
            seen.add(row["question"])
            rows.append(row)
    return rows


def main(out=OUT):
    out = Path(out)
    out.mkdir(exist_ok=True)
    files = {
        "train": problems(NUM_TRAIN, 0, False, SEED),
        "eval": problems(NUM_EVAL, 0, True, SEED + 1),
        "eval_wordings": problems(NUM_EVAL, 1, True, SEED + 2),
    }
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", nargs="?", default=OUT, type=Path)
    main(parser.parse_args().folder)
