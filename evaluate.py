"""Measure any Hugging Face model as training does: python evaluate.py CONFIG --model=FOLDER [--eval_samples=16 …]

In:   a config, for its held-out sets, prompt and sampling; any setting, above all `model`, `eval_data`, `eval_samples`.
Out:  a table; runs/CONFIG_eval/ with samples/ (every response) and questions.jsonl (one line a question).

    avg@k        the mean accuracy of k samples per question          pass@k      whether any of them is right
    majority@k   whether the most frequent answer is, as it is spelled after extraction; no answer is no vote
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import launch
from configs.load import UserError, load
from data.load import load_questions, local_model, read_tasks
from log import Log
from reward import extract_answer


def per_question(file, k):
    """The records of a file of samples: k lines for each question, in the order of the questions."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for group in (rows[start : start + k] for start in range(0, len(rows), k)):
        votes = Counter(answer for row in group if (answer := extract_answer(row["response"])))
        chosen = votes.most_common(1)[0][0] if votes else ""
        elected = [row["reward"] for row in group if extract_answer(row["response"]) == chosen]
        yield {
            "question": group[0]["question"],
            "answer": group[0]["answer"],
            "avg": float(np.mean([row["reward"] for row in group])),
            "pass": max(row["reward"] for row in group),
            "majority": max(elected) if votes else 0.0,
            "majority_answer": chosen,
            "response_tokens": float(np.mean([len(row["response_ids"]) for row in group])),
            "cut_off": float(np.mean([row["finish_reason"] == "length" for row in group])),
        }


def evaluate(cfg):
    """Sets → records. What a run has already measured at its start is measured in the same way, but nothing is trained."""
    cfg.train_data, cfg.advantage, cfg.kl_coef = [], "group", 0.0  # no critic, no reference
    if not cfg.eval_data:
        raise UserError("eval_data is empty: name the files to be measured on")
    data = {path: load_questions(path) for path in cfg.eval_data}
    cfg.model = local_model(cfg.model, "model")
    log = Log(cfg)
    try:
        tasks = read_tasks(cfg, data, log)
        workers = launch.Workers(cfg, log, on_gpu=launch.start_ray())
        workers.start()
        log.cut(0)
        log.step({"step": 0, "eval": launch.evaluate(cfg, workers, tasks, log, 0)} | workers.timings())
    except UserError:
        log.discard()
        raise
    finally:
        log.close()
    files = {name: log.dir / "samples" / f"eval_{name}_0.jsonl" for name in tasks.eval}
    return {name: list(per_question(file, cfg.eval_samples)) for name, file in files.items()}


def table(records, k):
    """A line for each set, and the mean over sets."""
    columns = {f"avg@{k}": "avg", f"pass@{k}": "pass", f"majority@{k}": "majority"}
    columns |= {"tokens": "response_tokens", "cut off": "cut_off"}
    result = Table("set", "questions", *columns)
    rows = {
        name: [np.mean([row[field] for row in rows]) for field in columns.values()]
        for name, rows in records.items()
    }
    shown = [(name, str(len(records[name])), means) for name, means in rows.items()]
    shown += [("mean over sets", "", np.mean(list(rows.values()), 0))] if len(rows) > 1 else []
    for name, size, means in shown:
        shares = [f"{means[3]:,.0f}" if i == 3 else f"{100 * mean:.1f}%" for i, mean in enumerate(means)]
        result.add_row(name, size, *shares)
    return result


def main(argv):
    try:
        cfg = load(argv)
        if not any(argument.startswith("--name=") for argument in argv):
            cfg.name += "_eval"
        records = evaluate(cfg)
        with open(Path(cfg.out_dir, cfg.name, "questions.jsonl"), "w", encoding="utf-8") as file:
            for name, rows in records.items():
                file.writelines(json.dumps({"set": name} | row) + "\n" for row in rows)
        Console().print(table(records, cfg.eval_samples))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
