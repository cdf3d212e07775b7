"""Countdown (the task of TinyZero): reach a target with + - * / and brackets, using each number once.

    python launch.py configs/qwen_0p5b_24gb.py        has this file as its task

docs/own_task.md shows it, with other settings, on a model that is small enough for a CPU.
"""

import ast
import random
from fractions import Fraction
from functools import reduce
from operator import add, mul, sub, truediv

from reward import extract_answer

COUNTS = [3, 4]  # how many numbers a question has
LARGEST = 50  # of its numbers
TEXT = "Make {target} from {numbers}, each used once, with + - * / and brackets, as in (1 + 2) * 3."
NUM_QUESTIONS = {"train": 20_000, "eval": 200}
OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def questions(split):
    held_out = set() if split == "eval" else {question["question"] for question in questions("eval")}
    rng = random.Random(split)  # a text can be a seed
    for _ in range(NUM_QUESTIONS[split]):
        target = 0
        while not 1 <= target <= 100:
            numbers = [rng.randint(1, LARGEST) for _ in range(rng.choice(COUNTS))]
            target = reduce(lambda a, b: rng.choice([add, sub, mul])(a, b), numbers)  # so there is a solution
        numbers.sort()
        text = TEXT.format(target=target, numbers=numbers)
        if text not in held_out:
            yield {"question": text, "answer": str(target), "numbers": numbers}


def value_of(node, used):
    """The value of a node of a syntax tree; its numbers are added to `used`. Nothing is evaluated as code."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    operation = OPERATIONS[type(node.op)]  # AttributeError or KeyError where it is none of the four
    return operation(value_of(node.left, used), value_of(node.right, used))


def is_correct(response, question):
    answer, used = extract_answer(response).strip(), []
    try:
        value = value_of(ast.parse(answer if len(answer) < 100 else "", mode="eval").body, used)
    except (SyntaxError, ValueError, AttributeError, KeyError, ZeroDivisionError):
        return False
    return value == int(question["answer"]) and sorted(used) == question["numbers"]
