"""Hard prompts: the questions that a run hardly ever solved, as a training file for a second stage.

    python data/mine_hard.py runs/orz_32b [--fewer_than=4] [--of=64] [--out=runs/orz_32b/hard.jsonl]

In:   RUN/samples/step_*.jsonl, every response of every training step with its reward.
Out:  JSON lines {"question", "answer"} and "choices" where there are some, which data/load.py reads, in the order of
      first use.

ORZ trained its 32B model's second stage on 13k such prompts: "fewer than 4 correct answers out of a total of 64
attempts" in the first 1,100 steps (arXiv 2503.24290, appendix B). A question that came up in several epochs has more
attempts than 64; then it is the share that counts, solved / attempts < 4 / 64. One with fewer than --of attempts is not
judged, and is counted.
"""

import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.load import UserError  # noqa: E402


def read_attempts(run):
    """{(question, answer): [attempts, solved, choices]} over all training steps, in the order of first use."""
    files = list((Path(run) / "samples").glob("step_*.jsonl"))
    if not files:
        raise UserError(f"{run!r} is no run: there is no samples/step_*.jsonl in it")
    attempts = {}
    for file in sorted(files, key=lambda file: int(re.sub(r"\D", "", file.stem) or 0)):
        number = 0
        try:
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    row = json.loads(line)
                    key, solved = (row["question"], row["answer"]), row["reward"] > 0
                    entry = attempts.setdefault(key, [0, 0, row.get("choices")])
                    entry[0] += 1
                    entry[1] += solved
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: no sample with question, answer and reward") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return attempts


def mine(run, fewer_than, of, out):
    """Write the hard questions of a run to the file `out`, beside it and renamed, and say what was counted."""
    attempts = read_attempts(run)
    judged = {key: entry for key, entry in attempts.items() if entry[0] >= of}
    hard = {key: entry for key, entry in judged.items() if entry[1] * of < fewer_than * entry[0]}
    never = sum(entry[1] == 0 for entry in hard.values())
    print(
        f"{len(attempts):,} questions, {len(attempts) - len(judged):,} of them with fewer than {of} attempts: left out"
    )
    print(
        f"{len(hard):,} of the other {len(judged):,} solved fewer than {fewer_than} times in {of}, {never:,} never"
    )
    if not hard:
        raise UserError(
            "there is nothing to write: raise --fewer_than, or lower --of to the attempts of a question"
        )
    part = f"{out}.tmp"
    try:
        with open(part, "w", encoding="utf-8") as file:
            for (question, answer), (_, _, choices) in hard.items():
                row = {"question": question, "answer": answer} | ({"choices": choices} if choices else {})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    print(f"written to {out}")


def main(argv):
    usage = "usage: python data/mine_hard.py RUN [--fewer_than=4] [--of=64] [--out=FILE]"
    settings = {"--fewer_than": "4", "--of": "64", "--out": f"{argv[0]}/hard.jsonl" if argv else ""}
    for argument in argv[1:]:
        key, _, value = argument.partition("=")
        if key not in settings or not value:
            print(f"error: {argument!r}; {usage}", file=sys.stderr)
            return 2
        settings[key] = value
    fewer_than, of, out = settings.values()
    if not argv or argv[0].startswith("-") or not (fewer_than.isdecimal() and of.isdecimal() and int(of) > 0):
        print(f"error: a run and whole numbers are needed; {usage}", file=sys.stderr)
        return 2
    try:
        mine(argv[0], int(fewer_than), int(of), out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
