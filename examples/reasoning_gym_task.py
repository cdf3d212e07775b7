"""A task of the package reasoning-gym (0.1.25), named by TASK: its generator makes the questions, its judge scores answers.

    python -m pip install reasoning-gym==0.1.25
    python launch.py configs/qwen_0p5b_24gb.py --task=examples/reasoning_gym_task.py

docs/own_task.md shows it on a model that is small enough for a CPU. An answer is correct if its score is 1. Many judges
give a wrong answer a small score for what it has in common with the right one.
"""

import reasoning_gym

from reward import extract_answer

TASK = "chain_sum"
SETTINGS = {"max_terms": 2, "max_digits": 2}  # of its generator; {} = the package's own, which are harder
# Question i depends on seed + i, so the two seeds must differ by more than the size of a split.
SIZES, SEEDS = {"train": 20_000, "eval": 128}, {"train": 0, "eval": 10**9}

REFUSED = {  # what a task's judge does with an answer (found by reading all judges) → the tasks
    "calls eval on it": "binary_matrix n_queens spiral_matrix string_insertion",
    "calls sympy's parse_expr on it, which calls eval": "countdown puzzle24 polynomial_multiplication "
    "simple_integration intermediate_integration",
    "accepts it whatever it is": "game_of_life_halting",
    "may be any of those that are refused": "composite",
}
for reason, names in REFUSED.items():
    if TASK in names.split():
        raise ValueError(f"{TASK} is refused: given an answer of the model, its judge {reason}")
DATASETS = {
    split: reasoning_gym.create_dataset(TASK, size=SIZES[split], seed=SEEDS[split], **SETTINGS)
    for split in SIZES
}
HELD_OUT = {entry["question"] for entry in DATASETS["eval"]}


def questions(split):
    for i, entry in enumerate(DATASETS[split]):
        if split == "eval" or entry["question"] not in HELD_OUT:
            yield {"question": entry["question"], "answer": str(entry["answer"]), "split": split, "index": i}


def is_correct(response, question):
    dataset = DATASETS[question["split"]]
    return dataset.score_answer(extract_answer(response), dataset[question["index"]]) == 1
