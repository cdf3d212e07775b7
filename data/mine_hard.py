"""Hard prompts: the questions that a run hardly ever solved, as a training file for a second stage.

    python data/mine_hard.py runs/orz_32b [--fewer_than=4] [--of=64] [--out=runs/orz_32b/hard.jsonl]

In:   RUN/samples/step_*.jsonl: every response of every training step, with the grader's verdict. Rewards do not matter.
Out:  JSON lines {"question", "answer"} and "choices" where there are some, which data/load.py reads, in the order of
      first use.

ORZ trained its 32B model's second stage on 13k such prompts: "fewer than 4 correct answers out of a total of 64
attempts" in the first 1,100 steps (arXiv 2503.24290, appendix B). A question that was used in several epochs has more than
64 attempts; therefore the share counts: it is hard if solved / attempts < 4 / 64. A question with fewer than --of
attempts is left out; the output says how many of these there are.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.load import UserError  # noqa: E402

USAGE = "usage: python data/mine_hard.py RUN [--fewer_than=4] [--of=64] [--out=FILE]"


@dataclass
class Record:
    """How often a run has tried and solved one question."""

    choices: dict | None  # of a multiple-choice question: {letter: content}
    attempts: int = 0
    solved: int = 0


def read_records(run):
    """{(question, answer): Record} over all training steps, in the order of first use."""
    files = list((Path(run) / "samples").glob("step_*.jsonl"))
    if not files:
        raise UserError(f"{run!r} is no run: there is no samples/step_*.jsonl in it")
    records = {}
    for file in sorted(files, key=step_of):
        number = 0
        try:
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    add_attempt(records, json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: no sample with question, answer and correct") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return records


def step_of(file):
    """The step in the name of a file of samples: 12 for step_12.jsonl."""
    return int(re.sub(r"\D", "", file.stem) or 0)


def add_attempt(records, row):
    """Count a sample (one line of a samples file) among its question's attempts."""
    key = (row["question"], row["answer"])
    record = records.setdefault(key, Record(row.get("choices")))
    record.attempts += 1
    # A sample of an older version has no `correct`; there a positive reward says that it is right.
    record.solved += row.get("correct", row["reward"] > 0)


def mine(run, fewer_than, of, out):
    """Write the hard questions of a run to the file `out`, atomically, and say what was counted."""
    records = read_records(run)
    judged, hard, never = 0, {}, 0
    for key, record in records.items():
        if record.attempts < of:
            continue
        judged += 1
        if record.solved / record.attempts < fewer_than / of:
            hard[key] = record
            if record.solved == 0:
                never += 1
    left_out = len(records) - judged
    print(f"{len(records):,} questions, {left_out:,} of them with fewer than {of} attempts: left out")
    rule = f"were solved fewer than {fewer_than} times in {of}"
    print(f"{len(hard):,} of the other {judged:,} {rule}, {never:,} never")
    if not hard:
        ways = "raise --fewer_than, or lower --of to the attempts of a question"
        raise UserError(f"there is nothing to write: {ways}")
    try:
        write_questions(hard, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    print(f"written to {out}")


def write_questions(hard, out):
    """Write the questions of `hard`, {(question, answer): Record}, to the file `out` as JSON lines, atomically."""
    with open(f"{out}.tmp", "w", encoding="utf-8") as file:
        for (question, answer), record in hard.items():
            row = {"question": question, "answer": answer}
            if record.choices:
                row["choices"] = record.choices
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(f"{out}.tmp", out)


def main(argv):
    settings = {"--fewer_than": "4", "--of": "64", "--out": f"{argv[0]}/hard.jsonl" if argv else ""}
    for argument in argv[1:]:
        key, _, value = argument.partition("=")
        if key not in settings or not value:
            print(f"error: {argument!r}; {USAGE}", file=sys.stderr)
            return 2
        settings[key] = value
    fewer_than, of, out = settings.values()
    numbers = fewer_than.isdecimal() and of.isdecimal() and int(of) > 0
    if not argv or argv[0].startswith("-") or not numbers:
        print(f"error: a run and whole numbers are needed; {USAGE}", file=sys.stderr)
        return 2
    try:
        mine(argv[0], int(fewer_than), int(of), os.path.expanduser(out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
