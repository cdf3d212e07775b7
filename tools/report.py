"""Make the report of a run, or of several overlaid: python tools/report.py RUN [RUN …] [--out=report.html]

In:   RUN/metrics.jsonl, RUN/config.json and RUN/tokens/*.npz (token_record.py) of each.
Out:  report.html in the folder of the first: one file that opens by double click, without a server or a network.

A run makes it anew after each evaluation, in a process of its own. tools/report.html is the page; this file puts the
data and uPlot (tools/uplot, MIT) into it, and nothing else. Arrays and texts are compressed and written in base64, so that
nothing that a model wrote can become part of the page's HTML: the page decodes it and shows it as text.

    index     {"created", "runs": ids of payloads}, as JSON
    run       JSON: metrics by step, questions, the responses as columns, and each different text of a token once
    tokens    uint32 [N] of a file: indices into the run's texts
    numbers   fp32 [quantities, N] of a file
"""

import base64
import datetime
import gzip
import html
import json
import math
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in tools/, Python looks for modules there only.

import token_record  # noqa: E402
from log import flatten, read_rows  # noqa: E402
from tools.runs import are_runs, run_names  # noqa: E402

TEMPLATE = ROOT / "tools" / "report.html"
UPLOT = ROOT / "tools" / "uplot"

# The most tokens that a report holds: about 100 MB, which a browser opens in seconds. Where a run has recorded more, training
# steps are left out evenly.
MOST_TOKENS = 4_000_000

# The arrays of token_record.py that the page shows.
QUANTITIES = (
    "values",
    "advantages",
    "raw_advantages",
    "policy_logprobs",
    "sampler_logprobs",
    "entropies",
    "importance_weights",
    "logprob_differences",
)
# What numpy and zipfile raise for a file that a crash has cut short, or that is no .npz file.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
# Settings that say little about a run, or are long.
HIDDEN_SETTINGS = ("versions", "content", "prompt_template", "out_dir", "name", "debug", "dry_run")


class Page:
    """The payloads of a page: compressed, in base64, each in an element with an id of its own."""

    def __init__(self):
        self.elements = []

    def add(self, content):
        """Add these bytes. Returns the id of their element."""
        name = f"payload{len(self.elements)}"
        compressed = gzip.compress(content, compresslevel=6, mtime=0)
        text = base64.b64encode(compressed).decode()
        self.elements.append(f'<script type="text/plain" id="{name}">{text}</script>')
        return name

    def add_json(self, value):
        return self.add(json.dumps(value, allow_nan=False).encode())

    def write(self, index, title, out):
        """Write the page into the file `out`, atomically."""
        page = TEMPLATE.read_text(encoding="utf-8")
        page = page.replace("{{title}}", html.escape(title))
        page = page.replace("{{uplot_css}}", (UPLOT / "uPlot.min.css").read_text(encoding="utf-8"))
        page = page.replace("{{uplot_license}}", (UPLOT / "LICENSE").read_text(encoding="utf-8"))
        page = page.replace("{{uplot_js}}", (UPLOT / "uPlot.min.js").read_text(encoding="utf-8"))
        index_text = json.dumps(index).replace("<", "\\u003c")
        index_element = f'<script type="application/json" id="index">{index_text}</script>'
        # The data comes last, so that no marker is looked for in it.
        page = page.replace("{{data}}", "\n".join([index_element, *self.elements]))
        temporary = f"{out}.{os.getpid()}.tmp"
        Path(temporary).write_text(page, encoding="utf-8")
        os.replace(temporary, out)


# ---- One run -----------------------------------------------------------------------------------------------------


def describe_run(name, folder, files, notes, page):
    """A run as the page reads it. files: those of its tokens/ that are shown; notes: lines about what is not."""
    settings = read_settings(folder)
    steps, metrics = read_metrics(folder)
    run = {"name": name, "settings": settings, "notes": notes, "steps": steps, "metrics": metrics}
    responses = Responses()
    for file in files:
        try:
            record = token_record.read(file)
            responses.add_file(file, record, page)
        except UNREADABLE as error:
            notes.append(f"{file.name} cannot be read and is left out: {error}")
    run["questions"] = list(responses.questions)
    run["vocabulary"] = list(responses.vocabulary)
    run["files"] = responses.files
    run["responses"] = responses.columns
    return run


def read_settings(folder):
    """The settings of the run that a reader may ask for: name → value."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in settings.items() if name not in HIDDEN_SETTINGS}


def read_metrics(folder):
    """The steps of metrics.jsonl, and each metric as a list over them, with None where it does not exist."""
    rows, num_broken = read_rows(folder / "metrics.jsonl")
    if num_broken:
        print(f"{folder}/metrics.jsonl: {num_broken} broken lines are left out", file=sys.stderr)
    flat_rows = [flatten(row) for row in rows]
    metrics = {}
    for i, row in enumerate(flat_rows):
        for name, value in row.items():
            if name == "step" or isinstance(value, str) or not math.isfinite(value):
                continue
            metrics.setdefault(name, [None] * len(rows))[i] = value
    return [row["step"] for row in rows], metrics


class Responses:
    """The recorded responses of a run. Questions and texts of tokens are kept once and named by their place."""

    COLUMNS = "file question row start length reward correct finish_reason graded question_accuracy".split()

    def __init__(self):
        self.files = []
        self.questions = {}  # (question, answer, prompt) → its place
        self.vocabulary = {}  # text of a token → its place
        self.columns = {name: [] for name in self.COLUMNS}

    def add_file(self, path, record, page):
        """Add the responses of a file of tokens/, as token_record.read returns it."""
        set_name, step = name_and_step(path)
        shown = [name for name in QUANTITIES if name in record]
        numbers = np.zeros((len(shown), len(record["tokens"])), "<f4")
        for i, name in enumerate(shown):
            numbers[i] = shorten(record[name], name)
        places = [self.place(self.vocabulary, text) for text in record["tokens"]]
        file = {"set": set_name, "step": step, "quantities": shown, "num_tokens": len(places)}
        file["tokens"] = page.add(np.array(places, "<u4").tobytes())
        file["numbers"] = page.add(numbers.tobytes())
        self.add_columns(record)
        self.files.append(file)

    def add_columns(self, record):
        """A value in each column for each response."""
        lengths = record["response_lens"].tolist()
        questions = []
        for texts in zip(record["questions"], record["answers"], record["prompts"]):
            questions.append(self.place(self.questions, texts))
        new = {
            "file": [len(self.files)] * len(lengths),
            "question": questions,
            "row": record["rows"].tolist(),
            "start": np.cumsum([0, *lengths[:-1]]).tolist(),
            "length": lengths,
            "reward": finite(record["rewards"]),
            "correct": record["correct"].tolist(),
            "finish_reason": record["finish_reasons"],
            "graded": record["graded"],
            "question_accuracy": finite(record["question_accuracy"]),
        }
        for name, values in new.items():
            self.columns[name] += values

    def place(self, places, key):
        """The key's place in the order of `places`. A new key is added at the end."""
        return places.setdefault(key, len(places))


def shorten(array, name):
    """The array rounded to fp16, whose three digits compress well. Differences of log-probs, which may be below 1e-7, stay
    fp32."""
    if name == "logprob_differences":
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def finite(array):
    """The numbers of an array as a list, with None where one is infinite or not a number."""
    return [value if math.isfinite(value) else None for value in array.tolist()]


# ---- Which files are shown ---------------------------------------------------------------------------------------


def name_and_step(path):
    """tokens/eval_SET_N.npz → (SET, N); tokens/step_N.npz → (None, N). None for another file."""
    found = re.fullmatch(r"(?:step|eval_(.+))_(\d+)\.npz", path.name)
    return (found[1], int(found[2])) if found else None


def token_files(folder):
    """The files of tokens/ in the order of the steps: training, then the evaluation after it."""
    files = []
    for path in folder.glob("tokens/*.npz"):
        found = name_and_step(path)
        if found:
            set_name, step = found
            files.append((step, set_name or "", path))
    return [path for _, _, path in sorted(files)]


def num_tokens(path):
    """The number of recorded tokens of a file; 0 if it cannot be read. Only the array of lengths is read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return int(file["response_lens"].sum())
    except UNREADABLE:
        return 0


def choose_files(files, most_tokens):
    """The evaluations, and as many training steps, evenly spaced, as most_tokens allow; the first and the last in any case.

    Returns the files, and a line about those that are left out, or None.
    """
    sizes = {path: num_tokens(path) for path in files}
    training = [path for path in files if name_and_step(path)[0] is None]
    evaluations = [path for path in files if name_and_step(path)[0] is not None]
    left = most_tokens - sum(sizes[path] for path in evaluations)
    every = 1
    while True:
        kept = training[::every]
        if training and training[-1] not in kept:
            kept.append(training[-1])
        if len(kept) <= 2 or sum(sizes[path] for path in kept) <= left:
            break
        every += 1
    shown = [path for path in files if path in set(kept + evaluations)]
    if len(kept) == len(training):
        return shown, None
    note = f"Of {len(training):,} recorded training steps, {len(kept):,} are shown: with all of them this run would have over"
    return shown, f"{note} {most_tokens:,} tokens (--max_tokens)."


# ---- The command -------------------------------------------------------------------------------------------------


def make_report(folders, out, most_tokens=MOST_TOKENS):
    """Write the report of the runs in these folders into the file `out`."""
    page = Page()
    payloads = []
    names = run_names(folders)
    for name, folder in zip(names, folders):
        files, note = choose_files(token_files(folder), most_tokens // len(folders))
        notes = [note] if note else []
        if not files:
            notes.append("There is no tokens/: the run was made with report_samples = 0, or by older code.")
        run = describe_run(name, folder, files, notes, page)
        payloads.append(page.add_json(run))
    created = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    page.write({"created": created, "runs": payloads}, f"{', '.join(names)}: nanoORZ report", out)


def main(arguments):
    folders, out, most_tokens = [], None, MOST_TOKENS
    for argument in arguments:
        if argument.startswith("--out="):
            out = argument.removeprefix("--out=")
        elif re.fullmatch(r"--max_tokens=\d+", argument):
            most_tokens = int(argument.removeprefix("--max_tokens="))
        elif argument.startswith("--"):
            print(f"error: {argument!r} is neither --out=FILE nor --max_tokens=NUMBER", file=sys.stderr)
            return 2
        else:
            folders.append(Path(argument))
    if not are_runs(folders, usage=__doc__.splitlines()[0]):
        return 2
    out = out or folders[0] / "report.html"
    try:
        make_report(folders, out, most_tokens)
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
