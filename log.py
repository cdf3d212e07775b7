"""A run's folder and what a run prints: metrics.jsonl, TensorBoard, samples, curves.png, report.html, the table of steps.

In:   the settings, and for each step a dict of metrics, in which None is a number that does not exist.
Out:  files in out_dir/NAME, which is made here, and lines on the terminal, with tables that fit its width.

The terminal shows the metrics that a person watches. metrics.jsonl holds all of them.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from configs.load import MAY_CHANGE, MAY_MOVE, ROOT, UserError
from reward import task_copy, task_file

TOOLS = ROOT / "tools"

# The version of a run's folder. Raise it whenever a run that was begun before a change could not go on after it,
# because settings, metrics, checkpoints or random numbers have another meaning.
RUN_VERSION = 2

# What config.json has beside the settings. The hashes in "content" are compared by changed_content.
RECORDED = ("versions", "commit", "content")

HEADER_EVERY = 20  # steps
REPORT_SECONDS = 60  # that a finished run waits for its last report; a run that is told to stop does not wait
WANDB = "Weights & Biases"


class Column(NamedTuple):
    """A column of a printed table. `metric` is a name of metrics.jsonl; "seconds/policy" is a nested one."""

    metric: str
    title: str
    width: int
    format: str


# The columns stand in the order of their importance: where the terminal is too narrow, the last ones are left out.
STEP_COLUMNS = [
    Column("step", "step", 10, "{}"),
    Column("minutes_left", "min.left", 9, "{:,.1f}"),
    Column("accuracy", "accuracy", 9, "{:.1%}"),
    Column("reward", "reward", 8, "{:.3f}"),
    Column("response_tokens", "length", 9, "{:,.1f}"),
    Column("cut_off", "cut_off", 8, "{:.1%}"),
    Column("entropy", "entropy", 8, "{:.4f}"),
    Column("v_loss", "v_loss", 7, "{:.4f}"),
    Column("explained_var", "expl.var", 9, "{:.2f}"),
    Column("drift_mean", "drift", 9, "{:.1e}"),
    Column("tokens_per_second", "tokens/s", 9, "{:,.0f}"),
    Column("seconds/generate", "generate", 9, "{:.1f}s"),
    Column("seconds/critic", "critic", 7, "{:.1f}s"),
    Column("seconds/policy", "policy", 7, "{:.1f}s"),
]
EVALUATION_COLUMNS = [
    Column("name", "set", 16, "{}"),
    Column("accuracy", "accuracy", 10, "{:.1%}"),
    Column("accuracy_stderr", "stderr", 9, "±{:.1%}"),
    Column("pass_at_k", "pass@k", 9, "{:.1%}"),
    Column("majority_at_k", "majority@k", 12, "{:.1%}"),
    Column("response_tokens", "length", 10, "{:,.1f}"),
    Column("cut_off", "cut_off", 9, "{:.1%}"),
]


class DetachableStream:
    """A text stream that drops its output once its terminal or pipe has gone, instead of raising.

    A closed terminal, or the `tee` that dies of the same Ctrl-C, must not end a run before it has saved.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.detach()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.detach()

    def detach(self):
        """Send what is still buffered, and all later output, to /dev/null."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def outlive_terminal():
    """Make sure that printing never raises, from here on. A terminal without UTF-8 shows escapes."""
    sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, DetachableStream):
        sys.stdout, sys.stderr = DetachableStream(sys.stdout), DetachableStream(sys.stderr)


class Log:
    def __init__(self, cfg):
        """Make the run's folder, or find it again. Raises UserError, and changes nothing, if it is not this run's."""
        self.cfg = cfg
        self.dir = Path(cfg.out_dir) / cfg.name
        self.tensorboard = None  # opened by cut()
        self.wandb = None  # opened by cut()
        self.report_process = None  # that makes report.html
        self.drift_means = []  # of the steps so far
        self.first_step = None  # of this process
        self.first_step_end = None  # in seconds of time.monotonic()
        self.columns = []  # of the last header
        self.rows_below_header = 0
        self.failed_writes = Counter()  # what could not be written → how often
        outlive_terminal()
        cfg.versions = installed()  # Every node must have these packages: the Workers compare.
        settings = json.loads(json.dumps(vars(cfg)))
        settings |= {"run_version": RUN_VERSION, "commit": code_commit()}
        task = task_file(cfg, cfg.task)
        try:
            self.new = not files_in(self.dir)
            self.new_parents = [folder for folder in self.dir.parents if not folder.exists()]
            check_same_run(self.dir, settings)
            self.make_folder(settings, task)
        except BlockingIOError:
            raise UserError(f"{self.dir}: another process is at work in it") from None
        except OSError as error:
            reason = f"cannot write to {self.dir}: {error.strerror}"
            raise UserError(f"{reason}; choose an --out_dir") from None

    def make_folder(self, settings, task):
        """Make what is missing of the folder, lock it for this process, and write config.json. Raises OSError."""
        for folder in ("samples", "logs"):
            (self.dir / folder).mkdir(parents=True, exist_ok=True)
        self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
        fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if task:
            task_copy(self.cfg).write_text(task.text, encoding="utf-8")
        # The file is renamed when it is complete, so that a crash never leaves half of it.
        (self.dir / "config.tmp").write_text(json.dumps(settings, indent=2))
        os.replace(self.dir / "config.tmp", self.dir / "config.json")

    def discard(self):
        """Remove the folder of a run that has not begun, and its parent folders, unless they were there before.

        The folder of a run that has begun, or has reported an error, stays: a restart, too, may end in a UserError.
        """
        has_begun = files_in(self.dir) - {"config.json", "samples", "logs"}
        if self.new and not has_begun:
            shutil.rmtree(self.dir)
            for folder in self.new_parents:
                if not os.listdir(folder):
                    folder.rmdir()

    # ---- Files -------------------------------------------------------------------------------------------------

    def cut(self, step):
        """Forget the steps after `step`, which will be made again: cut metrics.jsonl, write TensorBoard's files anew."""
        from torch.utils.tensorboard import SummaryWriter

        rows, num_broken = read_rows(self.metrics.name)
        # Without a finished step nothing is kept: the evaluation before the first step is made again, too.
        rows = [row for row in rows if 0 < step >= row["step"]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if num_broken:
            self.say(f"{self.metrics.name}: {num_broken} broken lines are left out")
            self.metrics.truncate(0)
            self.metrics.write(text)
            self.metrics.flush()
        else:
            self.metrics.truncate(len(text))  # The file begins with these rows, in ASCII.
        shutil.rmtree(self.dir / "tensorboard", ignore_errors=True)
        self.tensorboard = SummaryWriter(str(self.dir / "tensorboard"))
        if self.cfg.wandb and self.wandb is None:
            self.open_wandb()
        self.drift_means = []
        for row in rows:
            self.scalars(row)
            if row.get("drift_mean") is not None:
                self.drift_means.append(row["drift_mean"])

    def rows(self):
        """The whole rows of metrics.jsonl.

        When a run goes on, cut() has left those of the steps up to its checkpoint. A fork of this project can therefore
        keep there what it must remember from step to step: a list in the metrics of each step.
        """
        return read_rows(self.metrics.name)[0]

    def best(self, steps):
        """The one of `steps` with the highest accuracy, averaged over the data sets; None if none was evaluated."""
        scores = {}
        for row in self.rows():
            if row["step"] in steps and row.get("eval"):
                scores[row["step"]] = statistics.mean(result["accuracy"] for result in row["eval"].values())
        return max(scores, key=scores.get, default=None)

    @contextlib.contextmanager
    def best_effort(self, what, errors=OSError):
        """Ignore a failed write of something that training does not need: the first is printed, and all are counted."""
        try:
            yield
        except errors as error:
            self.failed_writes[what] += 1
            if self.failed_writes[what] == 1:
                self.say(f"{what} cannot be written ({error}): the run goes on without it", bold=True)

    def scalars(self, metrics):
        """Write a step's metrics to TensorBoard, and to Weights & Biases where that is in use."""
        with self.best_effort("tensorboard/"):
            for name, value in flatten(metrics).items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, metrics["step"])
            self.tensorboard.flush()
        if self.wandb and metrics["step"] > self.wandb_sent["step"]:
            with self.best_effort(WANDB, Exception):
                self.wandb.log(flatten(metrics))
                self.wandb_sent["step"] = metrics["step"]
                self.wandb_file().write_text(json.dumps(self.wandb_sent))

    # ---- Weights & Biases --------------------------------------------------------------------------------------

    def wandb_file(self):
        """The file that keeps the id of this run at Weights & Biases and the last step that was sent there.

        A run that goes on makes its last steps again and gets the same metrics, and W&B cannot forget a step: what was
        sent once is not sent again.
        """
        return self.dir / "wandb.json"

    def check_wandb(self):
        """Raise UserError unless the package wandb is there and has a login, or needs none."""
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.dir / "wandb"))
        try:
            import wandb
        except ImportError:
            command = f"{sys.executable} -m pip install wandb"
            raise UserError(f"wandb=True needs the package wandb: {command}") from None
        if os.environ.get("WANDB_MODE", "online") != "online":
            return
        try:
            reason = "" if wandb.login(prompt=False) else "nobody is logged in"
        except wandb.Error as error:
            reason = str(error)
        if reason:
            raise UserError(f"wandb=True: {reason}; run `wandb login`, or set WANDB_MODE=offline")

    def open_wandb(self):
        """Begin this run at Weights & Biases, or go on with it."""
        import wandb

        if self.wandb_file().exists():
            self.wandb_sent = json.loads(self.wandb_file().read_text())
        else:
            self.wandb_sent = {"id": secrets.token_hex(4), "step": -1}
        config = dict(vars(self.cfg))
        del config["versions"]  # W&B lists the packages by itself.
        with self.best_effort(WANDB, Exception):
            self.wandb = wandb.init(
                project="nanoORZ",
                name=self.cfg.name,
                id=self.wandb_sent["id"],
                resume="allow",
                dir=self.dir,
                config=config,
                settings=wandb.Settings(console="off", silent=True),
            )
            self.wandb.define_metric("*", step_metric="step")

    def lines(self, name, rows):
        """Write samples/NAME.jsonl. `rows` are lines of JSON, as sample_line makes them, or dicts."""
        with self.best_effort("samples/"):
            (self.dir / "samples").mkdir(exist_ok=True)  # It may have been removed to save space.
            with open(self.dir / "samples" / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(row if isinstance(row, str) else json.dumps(row) + "\n")

    def curves(self):
        """Draw curves.png anew. A picture that fails does not end the run.

        A process of its own draws it, for two reasons: the memory that matplotlib keeps after each picture is freed when
        the process ends, and in a process group of its own it does not receive the terminal's Ctrl-C.
        """
        with self.best_effort("curves.png"):
            subprocess.run([sys.executable, TOOLS / "plot.py", self.dir], process_group=0)

    def report(self):
        """Begin to make report.html anew, in a process of its own that the run does not wait for (tools/report.py).

        If the process of an earlier report is still at work, it is ended, because its report would show less.
        """
        if self.cfg.report_samples == 0:
            return
        self.check_report()
        self.end_report()
        with self.best_effort("report.html"):
            command = ["nice", "-n", "5", sys.executable, TOOLS / "report.py", self.dir]
            with open(self.dir / "logs" / "report.log", "a") as output:
                self.report_process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)

    def check_report(self, seconds=0):
        """Wait at most `seconds` for a report that is being made, and print a line if it has failed."""
        if self.report_process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.report_process.wait(seconds)
            with self.best_effort("report.html"):
                if code != 0:
                    raise OSError(f"exit code {code}, see {self.dir}/logs/report.log")
            self.report_process = None

    def end_report(self):
        """End the process of a report that is still being made, and remove what it has written so far."""
        if self.report_process is not None:
            self.report_process.kill()
            self.report_process.wait()
            unfinished = self.dir / f"report.html.{self.report_process.pid}.tmp"
            unfinished.unlink(missing_ok=True)
            self.report_process = None

    # ---- The terminal ------------------------------------------------------------------------------------------

    def say(self, text, bold=False):
        """Print a text. Only a terminal gets bold type."""
        text = printable(text)
        if bold and sys.stdout.isatty():
            text = f"\x1b[1m{text}\x1b[0m"
        print(text, flush=True)

    def start(self, step, num_parameters, tasks):
        """Begin after the finished `step`: forget what came later, and print what will run.

        num_parameters is the number of parameters that learn; tasks holds the questions, as read_tasks returns them.
        """
        cfg = self.cfg
        self.cut(step)
        self.first_step, self.columns = None, []
        begin = f"from step {step + 1} of {cfg.steps}" if cfg.steps else "evaluation only"
        self.say(f"run         {self.dir}, {begin}")
        self.say(f"model       {cfg.model}: {num_parameters:,} parameters learn")
        self.say(f"workers     {cfg.workers}, {cfg.tensor_parallel} per vLLM engine")
        self.say(f"questions   {len(tasks.train):,} for training")
        if tasks.eval:
            held_out = [f"{len(prompts):,} in {name}" for name, prompts in tasks.eval.items()]
            self.say(f"held out    {', '.join(held_out)}")
        if cfg.steps:
            responses = cfg.prompts_per_step * cfg.samples_per_prompt
            tokens = responses * cfg.max_response_tokens
            self.say(
                f"each step   {cfg.prompts_per_step} questions x {cfg.samples_per_prompt} samples = {responses:,} responses"
                f" of at most {cfg.max_response_tokens:,} tokens = {tokens:,} tokens"
            )

    def step(self, metrics):
        """Write a step's metrics to metrics.jsonl and TensorBoard; print its evaluation, and its row of the table."""
        self.metrics.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.metrics.flush()
        self.scalars(metrics)
        if metrics.get("eval"):
            self.print_evaluation(metrics)
        if metrics["step"] > 0:
            self.print_row(metrics)

    def print_evaluation(self, metrics):
        rows = [{"name": name} | result for name, result in metrics["eval"].items()]
        columns = fitting_columns(EVALUATION_COLUMNS, rows[0], terminal_width())
        self.say(
            f"\nevaluation after step {metrics['step']}: k = {self.cfg.eval_samples} samples per question",
            bold=True,
        )
        self.say(header(columns))
        for row in rows:
            self.say(table_row(columns, row), bold=True)
        self.say("")
        self.columns = []  # The table of steps gets a new header, because the last one may be far up.

    def print_row(self, metrics):
        """The step's row of the table, a header above it where one is due, and warnings beneath it."""
        cells = self.cells(metrics)
        columns = fitting_columns(STEP_COLUMNS, cells, terminal_width())
        if columns != self.columns or self.rows_below_header == HEADER_EVERY:
            self.say(header(columns))
            self.columns, self.rows_below_header = columns, 0
        self.say(table_row(columns, cells))
        self.rows_below_header += 1
        for warning in find_warnings(metrics, self.drift_means):
            self.say(f"  {warning}", bold=True)
        if metrics.get("drift_mean") is not None:
            self.drift_means.append(metrics["drift_mean"])

    def cells(self, metrics):
        """The metrics under the names of STEP_COLUMNS. The reward is left out where it is the accuracy."""
        cells = dict(metrics)
        for phase, seconds in metrics["seconds"].items():
            cells[f"seconds/{phase}"] = seconds
        if "accuracy" in metrics and abs(metrics["reward"] - metrics["accuracy"]) < 1e-6:
            del cells["reward"]
        if self.first_step is None:
            self.first_step = metrics["step"]
            self.first_step_end = time.monotonic()
        seconds = time.monotonic() - self.first_step_end
        cells["minutes_left"] = minutes_left(metrics["step"], self.cfg.steps, self.first_step, seconds)
        cells["step"] = f"{metrics['step']}/{self.cfg.steps}"
        return cells

    def show(self, question, sample):
        """Print one response, at most 2,000 characters of it, and how it was judged."""
        self.say(f"\n  question: {question.question}")
        self.say(textwrap.indent(sample.text[:2000].strip("\n"), "    "))
        self.say(f"  reward:   {sample.reward:g} ({sample.finish_reason}; the answer is {question.answer})")

    def end(self, ending, step, argv):
        """Print how the run ended, what it reached, and commands for what may come next.

        ending is "done" or what stopped the run, step the last finished one, argv the arguments of launch.py.
        """
        if self.wandb:
            with self.best_effort(WANDB, Exception):
                self.wandb.finish()
        rows = self.rows()
        minutes = sum(sum(row["seconds"].values()) for row in rows) / 60
        reached = f" after step {step} of {self.cfg.steps}" if self.cfg.steps else ""
        self.say(f"\n{ending}{reached}: {minutes:.1f} minutes of work", bold=True)
        for name, accuracies in first_and_last_accuracy(rows).items():
            self.say(f"  accuracy on {name}: {accuracies}")
        self.check_report(REPORT_SECONDS if ending == "done" else 0)
        for what, count in self.failed_writes.items():
            self.say(f"  {what} could not be written {count} times")
        self.say(f"  the results are in {self.dir}")
        if (self.dir / "report.html").exists():
            self.say("  open report.html there in a browser to read them")
        saved = [int(path.name[5:]) for path in self.dir.glob("checkpoints/step_*[0-9]")]
        checkpoint = self.best(saved) or max(saved, default=None)
        program = [sys.orig_argv[0], short_path(ROOT / "launch.py")]
        self.say("what may come next:")
        for purpose, command in next_commands(self.cfg, program, argv, step, checkpoint):
            self.say(f"# {purpose}")
            self.say(shell_text(command, terminal_width()))


def read_rows(path):
    """The rows of a metrics.jsonl, and the number of broken lines. A crash may break the last line, a power loss any."""
    rows, num_broken = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                row["step"]
                rows.append(row)
            except (ValueError, TypeError, KeyError):
                num_broken += 1
    return rows, num_broken


# ---- Whose folder it is --------------------------------------------------------------------------------------------


def files_in(folder):
    """The names of what a folder holds, without empty files: a crash before the settings leaves an empty metrics.jsonl."""
    return {path.name for path in folder.glob("*") if path.stat().st_size}


def check_same_run(folder, settings):
    """Raise UserError unless the folder is new, or holds a run that can go on with these settings."""
    found = files_in(folder)
    if "config.json" not in found:
        if found - {"samples", "logs", "config.tmp", "task.py"}:
            raise UserError(f"{folder} exists and is no run: choose another --name, or move it away")
        return
    before = read_settings(folder)
    check_same_version(folder, before, settings)
    changed = []
    for name in sorted(settings):
        if before[name] != settings[name] and name not in (*MAY_CHANGE, *MAY_MOVE, *RECORDED):
            changed.append(f"{name}={before[name]!r}")
    changed += changed_content(before.get("content", {}), settings.get("content", {}))
    if changed:
        raise UserError(f"{folder} is a run with {', '.join(changed)}: choose another --name")


def changed_content(before, content):
    """What differs between the hashes of two runs' content (data/content.py), as texts."""
    changed = []
    for name in content:
        if content[name] == before.get(name):
            continue
        parts = ""
        if isinstance(content[name], dict):
            differing = [part for part in content[name] if content[name][part] != before[name].get(part)]
            parts = f" (other {', '.join(differing)})"
        changed.append(f"another {name}{parts}")
    return changed


def read_settings(folder):
    """What the folder's config.json holds. Raises UserError if it is not a JSON object."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        reason = f"{folder}/config.json does not hold the settings of a run"
        raise UserError(f"{reason}: choose another --name, or move it away") from None


def check_same_version(folder, before, settings):
    """Raise UserError if another version of the code began this run: with another RUN_VERSION, or with settings of
    other names."""
    version = before.get("run_version", 1)  # Version 1 did not write it down.
    if version == RUN_VERSION and before.keys() == settings.keys():
        return
    age = "an older" if version < RUN_VERSION else "another"
    commit = before.get("commit")
    which = f"git commit {commit}" if commit else "its git commit is not recorded"
    way_out = "choose another --name, or finish it with that version"
    raise UserError(f"{folder} was begun by {age} version of nanoORZ ({which}): {way_out}")


def code_commit():
    """The git commit of this code, with "-dirty" if files differ from it; "" if git does not know."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed():
    """Every package of this environment, with its version."""
    return sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})


# ---- The table of steps --------------------------------------------------------------------------------------------


def terminal_width():
    """The terminal's columns; 110 where the output goes to a file."""
    return shutil.get_terminal_size((110, 24)).columns


def fitting_columns(columns, cells, width):
    """Those of the columns for which `cells` has a metric, the first ones that fit into `width` characters."""
    fitting = []
    for column in columns:
        if column.metric in cells:
            width -= column.width
            if width < 0:
                break
            fitting.append(column)
    return fitting


def header(columns):
    return "".join(column.title.rjust(column.width) for column in columns)


def table_row(columns, cells):
    """A row of a table; "-" stands for a number that does not exist."""
    row = ""
    for column in columns:
        value = cells.get(column.metric)
        text = "-" if value is None else column.format.format(value)
        row += f" {text}".rjust(column.width)
    return row


def minutes_left(step, last_step, first_step, seconds_since_first):
    """Minutes until last_step at the mean speed since first_step; None at first_step, when nothing has been measured."""
    if step == first_step:
        return None
    seconds_per_step = seconds_since_first / (step - first_step)
    return seconds_per_step * (last_step - step) / 60


def find_warnings(metrics, previous_drift_means):
    """Signs that the policy has stopped learning, or that the learner and vLLM compute different log-probs."""
    found = []
    if metrics.get("entropy", 1.0) < 0.002:
        found.append("COLLAPSE? entropy near zero")
    # A task's rewards can differ where no response, or every response, is correct.
    if "reward_min" in metrics and metrics["reward_min"] == metrics["reward_max"]:
        found.append("COLLAPSE? all rewards equal")
    if metrics.get("cut_off", 0.0) > 0.5:
        found.append("COLLAPSE? responses at the length limit")
    if warning := drift_warning(metrics.get("drift_mean"), previous_drift_means):
        found.append(warning)
    return found


# Drift up to this size is rounding in fp32: it changes several-fold from step to step and means nothing.
ROUNDING_DRIFT = 1e-4


def drift_warning(drift_mean, previous_drift_means):
    """A warning if the drift is over three times the median of the ten steps before; None before there are ten."""
    last_ten = previous_drift_means[-10:]
    if drift_mean is None or drift_mean <= ROUNDING_DRIFT or len(last_ten) < 10:
        return None
    median = statistics.median(last_ten)
    if drift_mean <= 3 * median:
        return None
    return f"DRIFT? {drift_mean:.1e} is over three times {median:.1e}, the median of the last ten steps"


# ---- The last lines ------------------------------------------------------------------------------------------------


def first_and_last_accuracy(rows):
    """For each data set the accuracy in its first evaluation, and in its last one if there were several."""
    accuracies = {}
    for row in rows:
        for name, result in row.get("eval", {}).items():
            accuracies.setdefault(name, []).append(f"{result['accuracy']:.1%}")
    return {name: " → ".join(shown[:1] + shown[1:][-1:]) for name, shown in accuracies.items()}


def next_commands(cfg, program, argv, step, checkpoint):
    """Commands for what may come next, as (purpose, words of the command) each.

    program holds the words before the arguments argv of launch.py; step is the last that is finished, and checkpoint
    the step of a checkpoint, or None.
    """
    python = program[0]
    folder = short_path(f"{cfg.out_dir}/{cfg.name}")
    commands = []
    if step > 0:
        plot = [python, short_path(TOOLS / "plot.py"), folder]
        commands.append(("draw its curves; with several folders, the curves of several runs", plot))
    if checkpoint:
        export = [python, short_path(TOOLS / "export.py"), folder, str(checkpoint)]
        commands.append((f"export the checkpoint of step {checkpoint} as Hugging Face folders", export))
    if step > 0 and cfg.eval_data:
        # In an evaluation these settings must have the values of configs/eval_only.py.
        arguments = with_settings(argv, steps=None, critic_model=None, kl_coef=None, eval_every=None)
        name = f"{cfg.name}_evaluation"
        arguments = with_settings(arguments, eval_only=True, model=f"{folder}/policy", name=name)
        commands.append(("evaluate the policy", [*program, *arguments]))
    if step < cfg.steps:
        commands.append(("continue this run: the same command", [*program, *argv]))
    elif step > 0:
        longer = with_settings(argv, steps=2 * step)
        commands.append(("continue this run for as many steps again", [*program, *longer]))
    anew = with_settings(argv, name=f"{cfg.name}_2")
    return [*commands, ("start anew in another folder", [*program, *anew])]


def with_settings(argv, **settings):
    """The arguments with these settings replaced, or added at the end. A setting with the value None is removed."""
    kept = []
    for argument in argv:
        key = argument.removeprefix("--").partition("=")[0]
        if key not in settings:
            kept.append(argument)
    return kept + [f"--{key}={value}" for key, value in settings.items() if value is not None]


def short_path(path):
    """The path as seen from the current folder, if it lies inside it."""
    path = str(path)
    return path.removeprefix(os.getcwd() + "/")


def shell_text(command, width):
    """The words of a command as the shell reads them, in lines of at most `width` characters where the words allow it."""
    text = line = ""
    for word in map(shlex.quote, command):
        if line and len(f"{line} {word} \\") > width:
            text += f"{line} \\\n"
            line = "   "
        line = f"{line} {word}" if line else word
    return text + line


# ---- Texts ---------------------------------------------------------------------------------------------------------


def sample_line(sample, question):
    """A response as a line of samples/*.jsonl: with its question, its token ids and how it was graded.

    The Workers call this, each for its own responses, because the 8,192 of an ORZ step take 3 s in one process.
    """
    row = vars(sample) | {"response": sample.text} | question._asdict()
    for name in ("logprobs", "text", "line"):
        row.pop(name, None)
    return json.dumps(row, default=lambda ids: ids.tolist()) + "\n"


def flatten(metrics, prefix=""):
    """{"eval": {"a": 1}, "b": None, "c": [2, 3]} → {"eval/a": 1}. Lists are not curves: only metrics.jsonl has them."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None and not isinstance(value, list):
            flat[prefix + name] = value
    return flat


def printable(text):
    """The text with control characters and escapes made visible, so that a model's output cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
