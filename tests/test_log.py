"""The log: every number is written as it is, any JSON reader can read it, and no text of a model can do harm."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from configs.load import ROOT, UserError, load
from data.load import Question
from log import (
    RUN_VERSION,
    Log,
    drift_warning,
    minutes_left,
    next_commands,
    printable,
    sample_line,
    shell_text,
)
from tools import plot

NASTY = "a\x1b[2J\x1b]0;title\x07b\x00c\rd\x9b31me\u202ef\ud800g"
METRICS = {
    "step": 3,
    "reward": 0.25,
    "response_tokens": 1234.5,
    "response_tokens_right": None,
    "cut_off": 0.125,
    "entropy": 0.5,
    "clipfrac_low": None,
    "v_loss": 0.25,
    "explained_var": None,
    "drift_mean": 1e-7,
    "drift_max": 2e-6,
    "solved": [3, 5],
    "tokens": 6000,
    "seconds": {"generate": 1.5, "policy": 0.5, "pack": 0.001, "eval": 10.0},
    "eval": {"math": {"accuracy": 0.5, "cut_off": 0.0}},
}


def settings(tmp_path, **more):
    own = {"out_dir": str(tmp_path / "runs"), "name": "a", "seed": 1, "steps": 20, "eval_samples": 8}
    own |= {"task": "", "wandb": False, "report_samples": 0}
    return SimpleNamespace(**own | more)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    run = Log(settings(tmp_path))
    run.cut(0)
    yield run
    run.metrics.close()


def rows(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- Metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_valid_json_and_keep_their_values(run):
    """Fails if NaN is written to metrics.jsonl, where jq and JavaScript cannot read it, or if a row stays in a buffer
    that a killed run loses."""
    run.step(METRICS)
    run.step(METRICS | {"step": 4})
    first, second = rows(run.dir / "metrics.jsonl")  # the file is still open, and both rows must be in it
    assert (first["step"], second["step"]) == (3, 4)
    assert {key: first[key] for key in METRICS} == METRICS
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.step(METRICS | {"step": 5, "entropy": float("nan")})
    assert len(rows(run.dir / "metrics.jsonl")) == 2


def test_tensorboard_holds_the_same_numbers(run):
    """Fails if a curve in TensorBoard is shifted by a step or shows None as 0, or if a list, which is no scalar, ends
    the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.step(METRICS)
    run.step(METRICS | {"step": 4, "reward": 0.75, "eval": {}})
    run.tensorboard.flush()
    events = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward", "eval/math/accuracy", "seconds/generate"} <= names
    assert not {"clipfrac_low", "response_tokens_right", "step", "solved"} & names
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(3, 0.25), (4, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("eval/math/accuracy")] == [(3, 0.5)]


def test_curves_are_drawn_and_replaced_whole(run, monkeypatch):
    """Fails if a `$` in a data set's name is read as mathematics and ends the run, or if a viewer can find half a
    picture."""
    from matplotlib.figure import Figure

    run.step({"step": 0, "eval": {"a $x_{ b": {"accuracy": 0.1}}, "seconds": {}})
    run.step(METRICS)
    run.curves()
    picture = (run.dir / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")
    run.step(METRICS | {"step": 4})
    run.curves()
    assert (run.dir / "curves.png").read_bytes() != picture  # a step was added
    picture = (run.dir / "curves.png").read_bytes()

    def fail(figure, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError):
        plot.main([str(run.dir)])
    assert (run.dir / "curves.png").read_bytes() == picture


DRAWS = """
import contextlib, pathlib, signal, sys, types, log
signal.signal(signal.SIGINT, lambda *_: None)  # as a run does: it ends after the step
folder = types.SimpleNamespace(dir=pathlib.Path(sys.argv[1]), best_effort=lambda what: contextlib.nullcontext())
log.Log.curves(folder)
"""


def test_ctrl_c_does_not_reach_the_drawing(run):
    """The terminal sends SIGINT to every process in its foreground. Fails if it ends the process that draws the
    curves."""
    run.step(METRICS)
    process = subprocess.Popen(
        [sys.executable, "-c", DRAWS, str(run.dir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # the child is importing, and has yet to draw
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert (run.dir / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_curves_show_every_data_set_and_both_axes_of_figure_2(run, monkeypatch):
    """Fails if a second evaluation set is measured but never drawn, or if two runs in one picture cannot be told
    apart."""
    from matplotlib.figure import Figure

    drawn, colours = {}, {}

    def look(figure, path, **_):
        for axis in figure.axes:
            drawn[axis.get_title()] = [line.get_label() for line in axis.lines]
            colours[axis.get_title()] = {line.get_label(): line.get_color() for line in axis.lines}
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", look)
    run.step(METRICS | {"eval": {"a": {"accuracy": 0.1}, "b": {"accuracy": 0.2}}, "v_loss": 0.1})
    plot.main([str(run.dir)])
    assert drawn["Reward"] == ["reward", "eval/a/accuracy", "eval/b/accuracy"]
    assert drawn["Response length (tokens)"] == ["response_tokens"]
    assert drawn["Critic"] == ["v_loss"]
    (other := run.dir.parent / "b").mkdir()
    # A crash has cut the second line short.
    (other / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert plot.main([str(run.dir), str(other), f"--out={other}/both.png"]) == 0
    reward_colours = colours["Reward"]
    assert reward_colours["a: reward"] == reward_colours["a: eval/a/accuracy"] != reward_colours["b: reward"]
    assert plot.main([str(run.dir.parent / "none")]) == 2


@pytest.mark.parametrize(
    "rewards, limits", [((0.2, 0.9), (-0.02, 1.02)), ((0.2, 1.2), None), ((-5.0, -1.0), None)]
)
def test_curves_of_rewards_beyond_0_and_1(run, monkeypatch, rewards, limits):
    """Fails if rewards outside 0 to 1 leave the picture: a task's bonus of 0.2 once hid the curve where the run was at
    its best."""
    from matplotlib.figure import Figure

    axes = {}

    def look(figure, path, **_):
        axes.update({axis.get_title(): axis for axis in figure.axes})
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", look)
    for step, reward in enumerate(rewards, start=1):
        run.step(METRICS | {"step": step, "reward": reward, "v_loss": 3 * reward**2, "explained_var": -7.0})
    plot.main([str(run.dir)])
    lowest, highest = axes["Reward"].get_ylim()
    assert lowest < min(rewards) and highest > max(rewards) and lowest < 0 and highest > 1
    assert limits in (None, (lowest, highest))
    lowest, highest = axes["Critic"].get_ylim()
    assert lowest == -1 and highest > 3 * max(reward**2 for reward in rewards)


# ---- The tables ----------------------------------------------------------------------------------------------------


def tables(text):
    """The rows of all printed tables, each as {title: text} by the header above it."""
    rows, titles = [], []
    for line in text.splitlines():
        words = line.split()
        if words[:1] in (["step"], ["set"]):
            titles = words
        elif len(words) == len(titles) > 0:
            rows.append(dict(zip(titles, words)))
    return rows


def test_tables_show_what_was_measured(run, capsys):
    """Fails if a number that does not exist is shown as 0, or if one share is shown as 0.125 and another as 12.5%."""
    run.step(METRICS | {"tokens_per_second": 12345.6})
    evaluation, row = tables(capsys.readouterr().out)
    assert evaluation == {"set": "math", "accuracy": "50.0%", "cut_off": "0.0%"}
    assert row == {
        "step": "3/20",
        "min.left": "-",
        "reward": "0.250",
        "length": "1,234.5",
        "cut_off": "12.5%",
        "entropy": "0.5000",
        "v_loss": "0.2500",
        "expl.var": "-",
        "drift": "1.0e-07",
        "tokens/s": "12,346",
        "generate": "1.5s",
        "policy": "0.5s",
    }
    run.step({"step": 0, "seconds": {}})
    assert capsys.readouterr().out == ""


def test_evaluation_of_several_sets(run, capsys):
    """The mean over all sets has no standard error. Fails if the numbers of its row move under the titles of their
    neighbours."""
    scores = {
        "accuracy": 0.5,
        "pass_at_k": 1.0,
        "majority_at_k": 0.625,
        "response_tokens": 40.0,
        "cut_off": 0.0,
    }
    run.step({"step": 0, "eval": {"a": {"accuracy_stderr": 0.01} | scores, "overall": scores}, "seconds": {}})
    out = capsys.readouterr().out
    assert "evaluation after step 0: k = 8 samples per question" in out
    first, overall = tables(out)
    assert first["stderr"] == "±1.0%" and overall["stderr"] == "-"
    for row in (first, overall):
        assert (row["pass@k"], row["majority@k"], row["length"]) == ("100.0%", "62.5%", "40.0")


def test_reward_is_shown_where_it_is_not_the_accuracy(run, capsys):
    """Fails if the same number stands in two columns, or if a shaped reward is shown as the accuracy or not at all."""
    metrics = {"step": 1, "accuracy": 1 / 3, "reward": float(np.float32(1 / 3)), "seconds": {}}
    run.step(metrics)
    run.step(metrics | {"step": 2, "reward": -0.5})
    equal, shaped = tables(capsys.readouterr().out)
    assert equal["accuracy"] == "33.3%" and "reward" not in equal
    assert shaped["accuracy"] == "33.3%" and shaped["reward"] == "-0.500"


def test_header_comes_again(run, capsys):
    """Fails if the header is not repeated after a page of numbers, or after the columns have changed."""
    metrics = {name: value for name, value in METRICS.items() if name != "eval"}
    for step in range(1, 46):
        run.step(metrics | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [number for number, line in enumerate(lines) if "min.left" in line] == [0, 21, 42]
    run.step(METRICS | {"step": 46})  # an evaluation stands between the header and the row
    lines = capsys.readouterr().out.splitlines()
    assert "min.left" in lines[-2] and lines[-1].split()[0] == "46/20"
    run.step({"step": 47, "reward": 0.5, "seconds": {}})
    assert capsys.readouterr().out.splitlines()[0].split() == ["step", "min.left", "reward"]


def test_tables_fit_the_terminal(tmp_path, capsys, monkeypatch):
    """Rows that wrap cannot be read. Fails if a row is wider than the terminal, or if a narrower one shows other
    columns than the first, most important ones."""
    run = Log(settings(tmp_path, steps=1000, eval_samples=16))
    run.cut(0)
    large = {"accuracy": 1.0, "reward": -0.125, "response_tokens": 12345.6, "cut_off": 1.0, "tokens": 10**8}
    large |= {"entropy": 12.3456, "v_loss": 1.2345, "explained_var": -99.99, "drift_mean": 1e-10}
    large |= {
        "tokens_per_second": 123456.7,
        "seconds": {"generate": 9999.9, "critic": 999.9, "policy": 999.9},
    }
    scores = {"accuracy_stderr": 0.1, "pass_at_k": 1.0, "majority_at_k": 1.0}
    shown = {}
    for width in (110, 80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        for step in (999, 1000):
            run.step(large | {"step": step, "eval": {"gpqa_diamond": large | scores}})
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width
        rows = tables(out)
        assert rows[1]["step"] == "999/1000"
        shown[width] = [list(row) for row in rows[:2]]
    run.metrics.close()
    for table in (0, 1):
        for narrow, wide in ((60, 80), (80, 110)):
            assert shown[narrow][table] == shown[wide][table][: len(shown[narrow][table])]
    assert len(shown[80][0]) == 7 and "drift" in shown[110][1] and "v_loss" in shown[80][1]


def test_a_run_without_reward_shaping_fits_110_columns_whole(run, capsys):
    """Fails if the last columns, the learners' seconds, are cut off at 110 columns, the width that the table was made
    for."""
    seconds = {"generate": 1.0, "critic": 1.0, "policy": 1.0}
    run.step(METRICS | {"accuracy": 0.25, "tokens_per_second": 1.0, "seconds": seconds, "eval": {}})
    header, _ = capsys.readouterr().out.splitlines()
    assert len(header) <= 110 and header.split()[-3:] == ["generate", "critic", "policy"]


def test_minutes_left(run, capsys):
    """Fails if the time before the first step counts as that of a step, or if a run that is resumed at step 900
    divides by 900."""
    assert minutes_left(901, 1000, first_step=901, seconds_since_first=0.1) is None
    assert minutes_left(911, 1000, first_step=901, seconds_since_first=600.0) == 89.0
    assert minutes_left(1000, 1000, first_step=901, seconds_since_first=5940.0) == 0.0
    run.step({"step": 5, "seconds": {}})
    run.step({"step": 6, "seconds": {}})
    first, second = tables(capsys.readouterr().out)
    assert first["min.left"] == "-" and float(second["min.left"]) >= 0


def test_drift_warning(run, capsys):
    """Fails if no warning is printed when the drift between vLLM and the learner is over three times that of the steps
    before, or if one is printed for less."""
    ten = [0.01] * 5 + [0.02] * 5  # the median is 0.015
    assert drift_warning(0.045, ten) is None
    assert drift_warning(0.0451, ten).startswith("DRIFT? 4.5e-02 is over three times 1.5e-02")
    assert drift_warning(1.0, ten[1:]) is None  # nine steps are too few to judge by
    assert drift_warning(0.045, [9.0] * 90 + [0.01] * 10) is not None  # only the last ten count
    assert drift_warning(None, ten) is None
    # Differences of this size are fp32's rounding: in two seeds of the demo they rose to over three times the median.
    assert drift_warning(8e-8, [1e-8] * 10) is None
    run.step({"step": 0, "drift_mean": None, "seconds": {}})
    for step in range(1, 12):
        run.step({"step": step, "drift_mean": 0.01, "seconds": {}})
    assert "DRIFT?" not in capsys.readouterr().out
    run.cut(11)  # a run that is continued knows the steps before
    run.step({"step": 12, "drift_mean": 0.04, "seconds": {}})
    row, warning = capsys.readouterr().out.splitlines()[-2:]
    assert row.split()[0] == "12/20" and warning.strip().startswith("DRIFT? 4.0e-02")


def test_only_a_terminal_gets_bold_type(run, capsys, monkeypatch):
    """Fails if escape sequences are written to a log file, or if an evaluation is not in bold type on a terminal."""
    run.step(METRICS)
    assert "\x1b" not in capsys.readouterr().out
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        run.step(METRICS | {"step": 4})
        shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "\x1b[1m" in shown and shown.count("\x1b[1m") == shown.count("\x1b[0m")


# ---- The first lines and the last ----------------------------------------------------------------------------------


def test_first_lines_say_what_runs(run, capsys):
    """Fails if the first lines do not show the model, the number of samples or the folder: an hour could be spent on
    the wrong ones."""
    sizes = {"prompts_per_step": 64, "samples_per_prompt": 16, "max_response_tokens": 96}
    for name, value in (sizes | {"model": "some/model", "workers": 8, "tensor_parallel": 4}).items():
        setattr(run.cfg, name, value)
    run.start(
        0, 1619072, SimpleNamespace(train=[None] * 4096, eval={"math": [None] * 512, "aime": [None] * 30})
    )
    out = capsys.readouterr().out
    for words in (
        str(run.dir),
        "from step 1 of 20",
        "some/model: 1,619,072 parameters learn",
        "8, 4 per vLLM engine",
    ):
        assert words in out
    assert "questions   4,096 for training\nheld out    512 in math, 30 in aime\n" in out
    assert "64 questions x 16 samples = 1,024 responses" in out and "= 98,304 tokens" in out
    run.cfg.steps = 0
    run.start(0, 0, SimpleNamespace(train=[], eval={"math": [None] * 512}))
    out = capsys.readouterr().out
    assert "evaluation only" in out and "0 parameters learn" in out and "each step" not in out


def test_last_lines_say_what_was_reached(run, capsys):
    """Fails if the last lines do not repeat a run's result, which may have scrolled away long before."""
    for step, accuracy in ((0, 0.1), (10, 0.3), (20, 0.25)):
        run.step({"step": step, "eval": {"a": {"accuracy": accuracy}}, "seconds": {"eval": 30.0}})
    run.cfg.eval_data = ["a.jsonl"]
    (run.dir / "checkpoints/step_10").mkdir(parents=True)
    (run.dir / "checkpoints/step_20").mkdir()
    capsys.readouterr()
    run.end("stopped by SIGTERM", 20, ["configs/tiny.py"])
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 20 of 20: 1.5 minutes of work" in out
    assert "accuracy on a: 10.0% → 25.0%" in out and f"the results are in {run.dir}" in out
    assert "export the checkpoint of step 10" in out  # the best one
    run.cfg.steps = 0
    run.end("done", 0, ["configs/tiny.py"])
    assert "done: 1.5 minutes of work" in capsys.readouterr().out


def test_last_lines_where_another_program_called(run, capsys, monkeypatch):
    """bench/step.py, a sweep or a notebook calls launch.main with more arguments than its own command has. Fails if a
    finished run then ends in an IndexError."""
    run.cfg.eval_data = []
    monkeypatch.chdir("/")
    argv = ["configs/tiny.py", "--steps=20", "--workers=2"]
    for command in (["python", "sweep.py"], ["python", "sweep.py", "--a", "--b", "--c"]):
        monkeypatch.setattr(sys, "orig_argv", command)
        run.end("done", 20, argv)
        words = capsys.readouterr().out.replace("\\\n", "").split()
        assert "sweep.py" not in words
        assert words[words.index("configs/tiny.py") - 1] == f"{ROOT}/launch.py"


ARGUMENTS = [
    "--workers=2",
    "--steps=20",
    "--eval_every=-1",
    "--prompt_template={question}\nThink, it's worth it:",
]


@pytest.mark.parametrize("step", [0, 7, 20])
def test_commands_can_be_given_as_they_stand(tmp_path, step):
    """Fails if a printed command for the next step has a setting that is refused, names another run, or breaks in the
    shell."""
    argv = [str(ROOT / "configs/tiny.py"), f"--out_dir={tmp_path}", *ARGUMENTS]
    cfg = load(argv)
    commands = dict(next_commands(cfg, ["python", "launch.py"], argv, step, checkpoint=step or None))
    for command in commands.values():
        text = shell_text(command, 100)
        assert max(map(len, text.splitlines())) <= 100
        words = subprocess.check_output(f"printf '%s\\0' {text}", shell=True, text=True)
        assert words.split("\0")[:-1] == command
        if command[1] == "launch.py":
            assert vars(load(command[2:]))["out_dir"] == str(tmp_path)
        else:
            assert Path(command[1]).is_file() and command[2] == f"{tmp_path}/tiny"
    anew = load(commands["start anew in another folder"][2:])
    assert vars(anew) == vars(cfg) | {"name": "tiny_2"}
    names = [name.split(":")[0] for name in commands]
    assert ("continue this run" in names) == (step < 20)
    if step == 20:
        again = load(commands["continue this run for as many steps again"][2:])
        assert vars(again) == vars(cfg) | {"steps": 40}
    if step:
        alone = load(commands["evaluate the policy"][2:])
        assert alone.eval_only and alone.model == f"{tmp_path}/tiny/policy" and alone.eval_every > 0
        assert (alone.name, alone.prompt_template) == ("tiny_evaluation", cfg.prompt_template)


# ---- Texts ---------------------------------------------------------------------------------------------------------


def sample(text):
    arrays = {"prompt_ids": np.array([1, 2], np.int32), "response_ids": np.array([3], np.int32)}
    more = {"logprobs": np.array([-0.5], np.float32), "finish_reason": "stop", "reward": 1.0}
    result = SimpleNamespace(question=1, text=text, **arrays, **more)
    result.line = sample_line(result, QUESTION)
    return result


QUESTION = Question(NASTY, "7")


def test_samples_keep_every_character(run):
    """Fails if a response with a line break, a null byte or half a surrogate pair breaks the file or ends the run."""
    run.lines("step_3", [sample(NASTY + "\n").line, sample("\u2028").line])
    first, second = rows(run.dir / "samples" / "step_3.jsonl")
    expected = {"question": NASTY, "answer": "7", "prompt_ids": [1, 2], "response_ids": [3]}
    expected |= {"response": NASTY + "\n", "finish_reason": "stop", "reward": 1.0}
    assert {key: first[key] for key in expected} == expected
    assert second["response"] == "\u2028"


def test_terminal_is_safe(run, capsys):
    """Fails if a response can clear the screen, rename the window, or reverse the direction of the line."""
    run.show(QUESTION, sample(NASTY))
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown and "\\x00" in shown and "\\ud800" in shown and "the answer is 7" in shown
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert printable("plain ε text\n") == "plain ε text\n"


def test_terminal_without_unicode(tmp_path, monkeypatch):
    """With LANG=C, as on some clusters, stdout is ASCII. Fails if the first ε in a response ends the run with a
    UnicodeEncodeError."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run = Log(settings(tmp_path))
    run.say("ε")
    run.metrics.close()
    assert terminal.buffer.getvalue() == b"\\u03b5\n"


READ_BY_NOBODY = """
import pathlib, sys, types, log
cfg = types.SimpleNamespace(out_dir=sys.argv[1], name="a", steps=20, eval_samples=8, task="", wandb=False)
run = log.Log(cfg)
run.cut(0)
sys.stdin.readline()
for step in (1, 2, 3):
    run.step({"step": step, "reward": 0.5, "seconds": {}})
"""


def test_output_that_nobody_reads(tmp_path):
    """Nobody reads the output after `| head`, or when the terminal has been closed. Fails if the next printed line
    ends the run."""
    command = [sys.executable, "-c", READ_BY_NOBODY, str(tmp_path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0 and "Error" not in errors, errors
    assert [row["step"] for row in rows(tmp_path / "a/metrics.jsonl")] == [1, 2, 3]


def rewards(smallest, largest):
    """The metrics of a step with these smallest and largest rewards; half of the responses have each."""
    return {"reward": (smallest + largest) / 2, "reward_min": smallest, "reward_max": largest}


@pytest.mark.parametrize(
    "change, name",
    [
        ({}, None),
        ({"entropy": 1e-3}, "entropy near zero"),
        ({"accuracy": 0.0} | rewards(0.0, 0.0), "all rewards equal"),
        ({"accuracy": 1.0} | rewards(1.0, 1.0), "all rewards equal"),
        ({"cut_off": 0.7}, "responses at the length limit"),
        ({"accuracy": 0.0} | rewards(-0.5, -0.5), "all rewards equal"),
        ({"accuracy": 0.5} | rewards(0.2, 0.2), "all rewards equal"),
        ({"accuracy": 0.5} | rewards(-1.0, 1.0), None),
        ({"accuracy": 0.0} | rewards(0.0, 0.2), None),
        ({"accuracy": 1.0} | rewards(1.0, 1.2), None),
    ],
)
def test_collapse_is_called_by_name(run, capsys, change, name):
    """Fails if no warning is printed for a policy that has collapsed, whose row looks like any other, or if one is
    printed for a healthy policy."""
    run.step(METRICS | {"entropy": 0.5, "cut_off": 0.1} | change)
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("COLLAPSE? " + name in last) if name else ("COLLAPSE" not in last)


# ---- The folder ----------------------------------------------------------------------------------------------------


def test_folder_holds_the_settings(run):
    """Fails if a run's folder does not record the settings that it was started with."""
    assert json.loads((run.dir / "config.json").read_text())["seed"] == 1


def test_existing_folder_is_left_alone(tmp_path):
    """Fails if files are written into a folder that is not a run, or that is another run of the same name."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no run: choose another --name"):
        Log(settings(tmp_path))
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["thesis.tex"]
    # The folder holds somebody's curve, to be drawn beside others.
    (tmp_path / "runs/a/thesis.tex").rename(tmp_path / "runs/a/metrics.jsonl")
    with pytest.raises(UserError, match="is no run: choose another --name"):
        Log(settings(tmp_path))
    # This is what a crash leaves that came before the settings were written.
    (tmp_path / "runs/a/metrics.jsonl").write_text("")
    Log(settings(tmp_path, seed=1, steps=3)).metrics.close()
    with pytest.raises(UserError, match="is a run with seed=1: choose another --name"):
        Log(settings(tmp_path, seed=2, steps=4))
    Log(settings(tmp_path, seed=1, steps=4)).metrics.close()  # with more steps it is the same run
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["steps"] == 4


# Made by commit 028e8cd with configs/tiny.py; its list of versions was shortened.
OLD_RUN = ROOT / "tests/old_run"


def recorded(folder, **changes):
    """Write these values into the settings that the folder records; None removes a setting."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes, words",
    [
        (None, "begun by an older version of nanoORZ (its git commit is not recorded)"),  # OLD_RUN unchanged
        ({"run_version": RUN_VERSION - 1}, "begun by an older version of nanoORZ (git commit abc123)"),
        ({"run_version": RUN_VERSION + 1}, "begun by another version of nanoORZ (git commit abc123)"),
        # base.py gained a setting.
        ({"eval_top_p": None}, "begun by another version of nanoORZ (git commit abc123)"),
        # base.py lost a setting.
        ({"value_norm": True}, "begun by another version of nanoORZ (git commit abc123)"),
        ({"run_version": None, "seed": 7}, "begun by an older version of nanoORZ"),  # not "a run with seed=7"
        ({"seed": 7}, "is a run with seed=7"),
        ({}, None),
    ],
)
def test_run_of_another_version_is_refused(tmp_path, changes, words):
    """Fails if an older version's run is continued under settings that it never had, or ends in a KeyError or in a
    message such as "with seed=None"."""
    cfg = load([str(ROOT / "configs/tiny.py"), f"--out_dir={tmp_path}", "--name=a"])
    if changes is None:
        shutil.copytree(OLD_RUN, tmp_path / "a")
    else:
        Log(cfg).metrics.close()
        recorded(tmp_path / "a", **{"commit": "abc123"} | changes)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    if words is None:
        Log(cfg).metrics.close()
        return
    with pytest.raises(UserError) as refusal:
        Log(cfg)
    message = str(refusal.value)
    assert words in message and "choose another --name" in message and "\n" not in message
    assert ("finish it with that version" in message) == ("begun" in words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("text", ["{", "[1]", "7", "\x00"])
def test_settings_that_cannot_be_read(tmp_path, text):
    """Fails if a config.json that was edited by hand, or belongs to another program, ends in a traceback."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text(text)
    with pytest.raises(
        UserError, match="config.json does not hold the settings of a run: choose another --name"
    ):
        Log(settings(tmp_path))


def test_folder_holds_the_version(run):
    """Fails if a run's folder does not record which version of the code began it."""
    found = json.loads((run.dir / "config.json").read_text())
    assert found["run_version"] == RUN_VERSION
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    commit = found["commit"].removesuffix("-dirty")
    assert head.startswith(commit) and bool(commit) == bool(head)


def test_one_process_at_a_time(run, tmp_path):
    """Fails if the same command, started twice, makes two runs write into the same files, or if the second one's
    settings are saved."""
    with pytest.raises(UserError, match="another process is at work in it"):
        Log(settings(tmp_path, steps=9))
    assert json.loads((run.dir / "config.json").read_text())["steps"] == 20


def test_only_a_new_folder_is_discarded(run, tmp_path):
    """Fails if a second attempt removes the folder of a failed run, and its evidence, because it is refused itself."""
    (run.dir / "nonfinite_policy_1.npz").write_bytes(b"evidence")
    run.metrics.close()
    again = Log(settings(tmp_path))
    again.discard()
    assert (run.dir / "nonfinite_policy_1.npz").exists()
    new = Log(settings(tmp_path, name="b"))
    new.discard()
    assert not new.dir.exists() and run.dir.exists()
    deep = Log(settings(tmp_path, out_dir=str(tmp_path / "c/d e/[f]")))
    deep.discard()
    assert not (tmp_path / "c").exists() and tmp_path.exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/step_1/policy_0.safetensors", "error.txt"])
def test_a_run_that_has_begun_is_not_discarded(run, file):
    """Fails if a restart that finds too few machines removes the folder of a run, with its checkpoints."""
    assert run.new
    (run.dir / file).parent.mkdir(parents=True, exist_ok=True)
    (run.dir / file).write_text("{}\n")
    run.discard()
    assert (run.dir / file).read_text() == "{}\n"


def test_cut_forgets_what_came_after(run):
    """Fails if a step that is made again is in metrics.jsonl or TensorBoard twice, or if half a line, left by a crash,
    stops the resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in range(5):
        run.step(METRICS | {"step": step, "reward": step / 10})
    before = (run.dir / "metrics.jsonl").read_text()
    with open(run.dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    run.cut(3)
    assert (run.dir / "metrics.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:4])
    run.step(METRICS | {"step": 4, "reward": 0.9})
    assert [row["step"] for row in rows(run.dir / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    run.tensorboard.flush()
    events = EventAccumulator(str(run.dir / "tensorboard")).Reload().Scalars("reward")
    assert [(event.step, round(event.value, 6)) for event in events] == [
        (0, 0),
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.9),
    ]
    run.cut(0)  # nothing was saved: the run starts from the beginning
    assert rows(run.dir / "metrics.jsonl") == []


def test_best_checkpoint(run):
    """Fails if the checkpoint with the best evaluation is deleted, or if one that was never evaluated is kept in its
    place."""
    for step, accuracy in ((2, 0.3), (4, 0.6), (6, 0.5), (8, 0.9)):
        run.step(METRICS | {"step": step, "eval": {"a": {"accuracy": accuracy}, "b": {"accuracy": 0.1}}})
    run.step({name: value for name, value in METRICS.items() if name != "eval"} | {"step": 9})
    assert run.best([2, 4, 6, 9]) == 4
    assert run.best([9]) is None
    # With a data set more or fewer it is the mean that counts; a step whose "eval" is empty was not evaluated.
    run.step(METRICS | {"step": 10, "eval": {name: {"accuracy": 0.3} for name in "abc"}})
    run.step(METRICS | {"step": 12, "eval": {}})
    assert run.best([4, 10, 12]) == 4
    assert run.best([12]) is None


def test_no_folder_can_be_made(tmp_path):
    """Fails if an out_dir that lies inside a file ends in a traceback."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot write to .*Not a directory; choose an --out_dir"):
        Log(settings(tmp_path))


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """Fails if a folder stays behind whose first file could not be written: the next attempt would be refused."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            Log(settings(tmp_path))
    Log(settings(tmp_path)).metrics.close()
