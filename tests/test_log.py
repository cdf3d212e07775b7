"""Logs: every number is written as it is, valid for every reader, and no text of a model can do harm."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from configs.load import ROOT, UserError
from data.load import Question
from log import Log, metrics_line, printable, sample_line
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
    "tokens": 6000,
    "seconds": {"generate": 1.5, "policy": 0.5, "pack": 0.001, "eval": 10.0},
    "eval": {"math": {"accuracy": 0.5, "cut_off": 0.0}},
}


def settings(tmp_path, **more):
    return SimpleNamespace(**{"out_dir": str(tmp_path / "runs"), "name": "a", "seed": 1, **more})


@pytest.fixture
def run(tmp_path):
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
    """NaN in metrics.jsonl, in silence: jq and JavaScript stop there. Or a row waits in a buffer when the run is killed."""
    run.step(METRICS)
    run.step(METRICS | {"step": 4})
    first, second = rows(run.dir / "metrics.jsonl")  # the file is still open: what is written must be there
    assert (first["step"], second["step"]) == (3, 4)
    assert {key: first[key] for key in METRICS} == METRICS
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.step(METRICS | {"step": 5, "entropy": float("nan")})
    assert len(rows(run.dir / "metrics.jsonl")) == 2


def test_tensorboard_holds_the_same_numbers(run):
    """A curve in TensorBoard is shifted by a step, or holds None as 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.step(METRICS)
    run.step(METRICS | {"step": 4, "reward": 0.75, "eval": {}})
    run.tensorboard.flush()
    events = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward", "eval/math/accuracy", "seconds/generate"} <= names
    assert not {"clipfrac_low", "response_tokens_right", "step"} & names
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(3, 0.25), (4, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("eval/math/accuracy")] == [(3, 0.5)]


def test_step_line_shows_what_was_measured():
    """A number that does not exist is shown as 0."""
    line = metrics_line("step 3", METRICS | {"tokens_per_second": 12345.6})
    parts = line.split("  ")
    assert parts[:2] == ["step 3", "eval[math] 0.5"]
    assert {
        "reward 0.25",
        "v_loss 0.25",
        "drift_max 2e-06",
        "tokens_per_second 12,346",
    } <= set(parts)
    assert {
        "response_tokens 1,234",
        "cut_off 0.125",
        "entropy 0.5",
        "drift_mean 1e-07",
        "generate 1.5s",
    } <= set(parts)
    assert "pack" not in line and "\n" not in line
    assert metrics_line("step 0", {"step": 0, "seconds": {}}) == "step 0"


def test_curves_are_drawn_and_replaced_whole(run, monkeypatch):
    """A `$` in a data set's name is taken for mathematics and ends the run; a viewer finds half a picture."""
    from matplotlib.figure import Figure

    run.step({"step": 0, "eval": {"a $x_{ b": {"accuracy": 0.1}}, "seconds": {}})
    run.step(METRICS)
    run.curves()
    picture = (run.dir / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")
    run.step(METRICS | {"step": 4})
    run.curves()
    assert (run.dir / "curves.png").read_bytes() != picture  # it grew
    picture = (run.dir / "curves.png").read_bytes()

    def fail(figure, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError):
        plot.main([str(run.dir)])
    assert (run.dir / "curves.png").read_bytes() == picture


DRAWS = """
import pathlib, signal, sys, types, log
signal.signal(signal.SIGINT, lambda *_: None)  # as a run does: it ends after the step
log.Log.curves(types.SimpleNamespace(dir=pathlib.Path(sys.argv[1])))
"""


def test_ctrl_c_does_not_reach_the_drawing(run):
    """The terminal sends it to every process in its foreground: the picture fails, and with it the run."""
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
    time.sleep(0.2)  # it imports, and has yet to draw
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert (run.dir / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_curves_show_every_data_set_and_both_axes_of_figure_2(run, monkeypatch):
    """A second evaluation set is measured for a week and never drawn; two runs in one picture cannot be told apart."""
    from matplotlib.figure import Figure

    drawn = {}

    def look(figure, path, **_):
        drawn.update({axis.get_title(): [line.get_label() for line in axis.lines] for axis in figure.axes})
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", look)
    run.step(METRICS | {"eval": {"a": {"accuracy": 0.1}, "b": {"accuracy": 0.2}}, "v_loss": 0.1})
    plot.main([str(run.dir)])
    assert drawn["Reward"] == ["reward", "eval/a/accuracy", "eval/b/accuracy"]
    assert drawn["Response length (tokens)"] == ["response_tokens"]
    assert drawn["Critic"] == ["v_loss"]
    (other := run.dir.parent / "b").mkdir()
    (other / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n{"step": 2, "rew'
    )  # a crash cut it short
    assert plot.main([str(run.dir), str(other), f"--out={other}/both.png"]) == 0
    assert "b: reward" in drawn["Reward"] and "a: reward" in drawn["Reward"]
    assert plot.main([str(run.dir.parent / "none")]) == 2


# ---- Texts ---------------------------------------------------------------------------------------------------------


def sample(text):
    arrays = {"prompt_ids": np.array([1, 2], np.int32), "response_ids": np.array([3], np.int32)}
    more = {"logprobs": np.array([-0.5], np.float32), "finish_reason": "stop", "reward": 1.0}
    result = SimpleNamespace(question=1, text=text, **arrays, **more)
    result.line = sample_line(result, QUESTION)
    return result


QUESTION = Question(NASTY, "7")


def test_samples_keep_every_character(run):
    """A response with a line break, a null byte or half a character breaks the file or ends the run."""
    run.lines("step_3", [sample(NASTY + "\n").line, sample("\u2028").line])
    first, second = rows(run.dir / "samples" / "step_3.jsonl")
    expected = {"question": NASTY, "answer": "7", "prompt_ids": [1, 2], "response_ids": [3]}
    expected |= {"response": NASTY + "\n", "finish_reason": "stop", "reward": 1.0}
    assert {key: first[key] for key in expected} == expected
    assert second["response"] == "\u2028"


def test_terminal_is_safe(run, capsys):
    """A response clears the screen, renames the window, or reverses the line, and hides what was there."""
    run.show(QUESTION, sample(NASTY))
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown and "\\x00" in shown and "\\ud800" in shown and "the answer is 7" in shown
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert printable("plain ε text\n") == "plain ε text\n"


def test_terminal_without_unicode(tmp_path, monkeypatch):
    """LANG=C on a cluster: the first ε in a response ends a run of a week with a UnicodeEncodeError."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run = Log(settings(tmp_path))
    run.say("ε")
    run.metrics.close()
    assert terminal.buffer.getvalue() == b"\\u03b5\n"


@pytest.mark.parametrize(
    "change, name",
    [
        ({}, None),
        ({"entropy": 1e-3}, "entropy near zero"),
        ({"reward": 0.0}, "all rewards equal"),
        ({"reward": 1.0}, "all rewards equal"),
        ({"cut_off": 0.7}, "responses at the length limit"),
    ],
)
def test_collapse_is_called_by_name(change, name):
    """A policy that says one thing for ever looks like any other line of numbers."""
    line = metrics_line("step 3", METRICS | {"entropy": 0.5, "cut_off": 0.1} | change)
    assert ("COLLAPSE? " + name in line) if name else ("COLLAPSE" not in line)


# ---- The folder ----------------------------------------------------------------------------------------------------


def test_folder_holds_the_settings(run):
    """Nobody knows any more what a run was started with."""
    assert json.loads((run.dir / "config.json").read_text())["seed"] == 1


def test_existing_folder_is_left_alone(tmp_path):
    """A folder that is no run, or another run of the same name: its files are written into."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no run: choose another --name"):
        Log(settings(tmp_path))
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["thesis.tex"]
    (tmp_path / "runs/a/thesis.tex").rename(
        tmp_path / "runs/a/metrics.jsonl"
    )  # somebody's curve, to draw beside others
    with pytest.raises(UserError, match="is no run: choose another --name"):
        Log(settings(tmp_path))
    (tmp_path / "runs/a/metrics.jsonl").write_text(
        ""
    )  # what a crash leaves that came before the settings were written
    Log(settings(tmp_path, seed=1, steps=3)).metrics.close()
    with pytest.raises(UserError, match="is a run with seed=1: choose another --name"):
        Log(settings(tmp_path, seed=2, steps=4))
    Log(settings(tmp_path, seed=1, steps=4)).metrics.close()  # longer is the same run
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["steps"] == 4


def test_one_process_at_a_time(run, tmp_path):
    """The same command started twice: two runs write into the same files; or the second leaves its settings there."""
    with pytest.raises(UserError, match="another process is at work in it"):
        Log(settings(tmp_path, steps=9))
    assert "steps" not in json.loads((run.dir / "config.json").read_text())


def test_only_a_new_folder_is_discarded(run, tmp_path):
    """A run that failed leaves its evidence; the next try finds too few machines and removes it."""
    (run.dir / "nonfinite_policy_1.npz").write_bytes(b"evidence")
    run.metrics.close()
    again = Log(settings(tmp_path))
    again.discard()
    assert (run.dir / "nonfinite_policy_1.npz").exists()
    new = Log(settings(tmp_path, name="b"))
    new.discard()
    assert not new.dir.exists() and run.dir.exists()


def test_cut_forgets_what_came_after(run):
    """A step that is made again stands twice in metrics.jsonl or TensorBoard, or a crash in mid-line stops the resume."""
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
    run.cut(0)  # nothing was saved: from the beginning
    assert rows(run.dir / "metrics.jsonl") == []


def test_best_checkpoint(run):
    """The checkpoint with the best evaluation is deleted, or one that was never evaluated is kept for it."""
    for step, accuracy in ((2, 0.3), (4, 0.6), (6, 0.5), (8, 0.9)):
        run.step(METRICS | {"step": step, "eval": {"a": {"accuracy": accuracy}, "b": {"accuracy": 0.1}}})
    run.step({name: value for name, value in METRICS.items() if name != "eval"} | {"step": 9})
    assert run.best([2, 4, 6, 9]) == 4
    assert run.best([9]) is None
    # a data set more, and one less: it is the mean that counts, and nothing evaluated is no evaluation
    run.step(METRICS | {"step": 10, "eval": {name: {"accuracy": 0.3} for name in "abc"}})
    run.step(METRICS | {"step": 12, "eval": {}})
    assert run.best([4, 10, 12]) == 4
    assert run.best([12]) is None


def test_no_folder_can_be_made(tmp_path):
    """out_dir is a file, or lies on a disk that is read-only: a traceback."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot write to .*Not a directory; choose an --out_dir"):
        Log(settings(tmp_path))


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """The folder was made, its first file was not: the next try says that the run exists already."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            Log(settings(tmp_path))
    Log(settings(tmp_path)).metrics.close()
