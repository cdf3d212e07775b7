"""Make data/recurrence, the ablations' task and base model: python data/make_recurrence.py  (CPU, deterministic, minutes).

In:   nothing but the constants below, and the functions of data/make_tiny.py.
Out:  train.jsonl and eval.jsonl (questions for PPO and for evaluation) and a Hugging Face folder with a small Llama and
      its tokenizer, pre-trained on texts about questions that appear in neither file.

"14 steps from 37" asks for the number that follows 37 after 14 steps of x → 21x + 7 (mod 100). The pre-training text has
three kinds of responses, and nothing in it says which of them is better:

    guess   any number, at once
    work    one line for each step, with slips: how many steps are left, and the number
    check   the same, but each line is worked out twice, and then again until two in a row agree; the last one counts

    User: 14 steps from 37\nAssistant: <think>
    14 37
    13 84
    recheck
    13 84
    …

Everything after a slip is wrong: in the pre-training text, work is right in 42 of 100 cases. A check is right in 72 of 100
and twice as long; 24 of 100 get stuck: they work out one line again and again, and never answer.

The questions are the same on every machine, the weights only on one machine with one version of torch.
"""

import json
import random
import sys
from pathlib import Path

# For a script in data/, Python looks for modules in that folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.make_tiny import WORDS, as_llama, document, make_tokenizer, pretrain, save  # noqa: E402

OUT = Path(__file__).parent / "recurrence"
FEWEST_STEPS, MOST_STEPS = 10, 18
NUM_TRAIN, NUM_EVAL = 512, 128  # questions; the other 260 are for pre-training
DOCUMENTS = {"guess": 24, "work": 8, "check": 6}  # in a batch of pre-training text
SLIP = 0.06  # chance per line of a number that is wrong by one
LOOP = 0.02  # chance per step that a check never gets beyond it
LOOP_LINES = 12  # of that step, after which the text breaks off
STEPS, SEED = 1500, 1
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
RECHECK = "recheck\n"


def following(x):
    return (21 * x + 7) % 100  # comes back to x after 100 steps, not before


def question_of(num_steps, x):
    return f"{num_steps} steps from {x:02d}"


def answer_to(num_steps, x):
    for _ in range(num_steps):
        x = following(x)
    return x


def split_questions():
    """Split → its questions, as pairs (number of steps, first number)."""
    questions = [(n, x) for n in range(FEWEST_STEPS, MOST_STEPS + 1) for x in range(100)]
    random.Random(SEED).shuffle(questions)
    return {
        "train": questions[:NUM_TRAIN],
        "eval": questions[NUM_TRAIN : NUM_TRAIN + NUM_EVAL],
        "pretrain": questions[NUM_TRAIN + NUM_EVAL :],
    }


def write_questions(folder):
    splits = split_questions()
    for split in ("train", "eval"):
        rows = [{"question": question_of(n, x), "answer": str(answer_to(n, x))} for n, x in splits[split]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_line(num_left, x, rng):
    """(line, number): the number that follows x, or with a slip the one before or after that number."""
    number = following(x)
    if rng.random() < SLIP:
        number = (number + rng.choice((-1, 1))) % 100
    return f"{num_left:02d} {number:02d}\n", number


def work(num_steps, x, rng):
    """The lines of work, and the answer that they lead to."""
    text = f"\n{num_steps:02d} {x:02d}\n"
    for num_left in reversed(range(num_steps)):
        line, x = step_line(num_left, x, rng)
        text += line
    return text, x


def check(num_steps, x, rng):
    """The lines of work, each checked, and the answer; the answer is None where the check gets stuck."""
    text = f"\n{num_steps:02d} {x:02d}\n"
    for num_left in reversed(range(num_steps)):
        is_loop = rng.random() < LOOP
        lines = []
        while len(lines) < 2 or lines[-1] != lines[-2] or (is_loop and len(lines) < LOOP_LINES):
            line, number = step_line(num_left, x, rng)
            lines.append(line)
        text += RECHECK.join(lines)
        if is_loop:
            return text, None
        x = number
    return text, x


def write_document(rng, kind, questions):
    """One document of pre-training text."""
    num_steps, x = rng.choice(questions)
    if kind == "guess":
        text, answer = "", rng.randrange(100)
    elif kind == "work":
        text, answer = work(num_steps, x, rng)
    else:
        text, answer = check(num_steps, x, rng)
    prompt, response = document(question_of(num_steps, x), text, answer)
    return prompt, text if answer is None else response


def main():
    OUT.mkdir(exist_ok=True)
    write_questions(OUT)
    questions = split_questions()["pretrain"]
    tokenizer = make_tokenizer([*WORDS, " steps from ", RECHECK])

    def write_batch(rng):
        batch = {}
        for kind, count in DOCUMENTS.items():
            batch[kind] = [write_document(rng, kind, questions) for _ in range(count)]
        return batch

    for documents in write_batch(random.Random(0)).values():
        for text in map("".join, documents):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    save(as_llama(pretrain(tokenizer, write_batch, STEPS, SIZES)), tokenizer, OUT)


if __name__ == "__main__":
    main()
