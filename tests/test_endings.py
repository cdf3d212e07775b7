"""No failed record ends a run, and every ending saves: streams, signals, damaged files; whole runs in `make soak`."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
from safetensors.numpy import save_file
from test_launch import DEADLINE, ROOT, finish, metrics, run, start, wait_for_step

import launch
import workers
from configs.load import UserError
from log import Log, read_rows

SETTINGS = ["--steps=20", "--eval_every=-1", "--prompts_per_step=16", "--samples_per_prompt=8"]


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **options)


# ---- Output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_nothing(stream):
    """`tee` ends with the same Ctrl-C. Fails if the next printed line then raises BrokenPipeError, or if Python's exit
    code is 120."""
    code = f"""
import sys, log
log.outlive_terminal()
log.outlive_terminal()  # a second run in the same process
print("first", file=sys.{stream}, flush=True)
sys.stdin.readline()  # until the reader has gone
for _ in range(3):
    print("lost " * 5000, file=sys.{stream}, flush=True)
print("still here", file=sys.{stream})
sys.exit(7)
"""
    process = python(code, stdin=subprocess.PIPE, **{stream: subprocess.PIPE})
    reader = getattr(process, stream)
    assert reader.readline() == "first\n"
    reader.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) == 7


@pytest.fixture
def log(tmp_path):
    log = Log(ranks.settings(out_dir=str(tmp_path), name="a", steps=3))
    log.cut(0)
    return log


ROW = {"step": 1, "reward": 0.5, "accuracy": 0.5, "seconds": {}}


def test_what_training_does_not_need_may_fail(log, capsys):
    """Fails if a full disk, a removed folder or a file in its place ends a long run while it only writes its
    records."""
    (log.dir / "samples").rmdir()
    log.lines("step_1", [{"a": 1}])
    assert (log.dir / "samples/step_1.jsonl").read_text() == '{"a": 1}\n'  # the folder was made again
    (log.dir / "samples/step_1.jsonl").unlink()
    (log.dir / "samples").rmdir()
    (log.dir / "samples").write_text("a file in the place of the folder")
    for step in (2, 3):
        log.lines(f"step_{step}", [{"a": 1}])
    log.tensorboard.flush = lambda: (_ for _ in ()).throw(OSError("No space left on device"))
    log.step(ROW)
    log.step(ROW | {"step": 2})
    assert [row["step"] for row in read_rows(log.metrics.name)[0]] == [1, 2]
    printed = capsys.readouterr().out
    assert printed.count("samples/ cannot be written") == printed.count("tensorboard/ cannot be written") == 1
    assert log.failed_writes == {"samples/": 2, "tensorboard/": 2}
    log.end("done", 2, [])
    assert "samples/ could not be written 2 times" in capsys.readouterr().out


def test_broken_lines_of_metrics_are_left_out(log, capsys):
    """A power failure leaves zeros or half a line in metrics.jsonl. Fails if the run cannot be continued or the curves
    cannot be drawn."""
    log.step(ROW)
    log.step(ROW | {"step": 2})
    log.metrics.write('\0\0\0\n{"step": 3, "rew\n[]\n' + json.dumps(ROW | {"step": 4}) + '\n{"step"')
    log.metrics.flush()
    rows, num_broken = read_rows(log.metrics.name)
    assert [row["step"] for row in rows] == [1, 2, 4] and num_broken == 4
    drawn = subprocess.run(
        [sys.executable, ROOT / "tools/plot.py", log.dir], capture_output=True, text=True, timeout=DEADLINE
    )
    assert drawn.returncode == 0 and "4 broken lines" in drawn.stderr, drawn.stderr
    assert (log.dir / "curves.png").stat().st_size > 0
    capsys.readouterr()
    log.cut(2)
    assert "4 broken lines are left out" in capsys.readouterr().out
    log.step(ROW | {"step": 3})
    assert [json.loads(line)["step"] for line in open(log.metrics.name)] == [1, 2, 3]


# ---- Signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ignored", [False, True])
def test_signals_are_heeded_unless_they_were_ignored(signum, ignored):
    """Fails if a run under nohup ends when the terminal closes, or if one without nohup does not notice it."""
    code = f"""
import os, signal, workers
signal.signal({int(signum)}, signal.{"SIG_IGN" if ignored else "default_int_handler"})
stop_request = workers.StopRequest()
stop_request.shield_children()
ignored = int("1" + "0" * (signal.SIGHUP - 1), 2)
child = os.popen("grep SigIgn /proc/self/status").read().split()[1]
assert int(child, 16) & ignored, "a child would die of the terminal's SIGHUP"
stop_request.listen()
os.kill(os.getpid(), {int(signum)})
print(stop_request.signal and stop_request.signal.name)
"""
    out, _ = python(code, stdout=subprocess.PIPE).communicate(timeout=60)
    assert out.strip() == ("None" if ignored else signum.name)


# ---- Checkpoints -------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    """Fails if a run can never be continued after a power failure during a write, which leaves half a file in the
    newest checkpoint."""
    cfg = SimpleNamespace(out_dir=tmp_path, name="a", workers=2, eval_only=False, model="m", critic_model="c")
    cfg.advantage, cfg.kl_coef, cfg.kl_loss_coef = "gae", 0.0, 0.0
    said = []
    log = SimpleNamespace(say=said.append)
    assert workers.newest_whole_checkpoint(cfg, log) == 0
    for step in (3, 5, 9, 12):
        folder = tmp_path / f"a/checkpoints/step_{step}"
        folder.mkdir(parents=True)
        for name in ("policy_0", "policy_1", "critic_0", "critic_1"):
            save_file({"0.weights": np.zeros(100, np.float32)}, folder / f"{name}.safetensors")
    assert workers.newest_whole_checkpoint(cfg, log) == 12 and not said
    whole = (folder / "policy_1.safetensors").read_bytes()
    checkpoints = tmp_path / "a/checkpoints"
    (checkpoints / "step_12/policy_1.safetensors").write_bytes(whole[:-4])
    (checkpoints / "step_9/critic_0.safetensors").unlink()
    (checkpoints / "step_5/critic_1.safetensors").write_bytes(b"\0" * len(whole))
    assert workers.newest_whole_checkpoint(cfg, log) == 3
    assert len(said) == 3
    assert f"step_12/policy_1.safetensors is cut short, {len(whole) - 4:,} of {len(whole):,} bytes" in said[0]
    assert "step_9/critic_0.safetensors No such file" in said[1]
    assert "step_5/critic_1.safetensors is not a whole safetensors file" in said[2]
    cfg.advantage = "grpo"  # it has no critic, whose files then do not matter
    assert workers.newest_whole_checkpoint(cfg, log) == 9


# ---- Start -------------------------------------------------------------------------------------------------------


def test_paths_with_a_space_are_refused_before_ray(monkeypatch):
    """With a space in a path Ray's Workers never start, and nothing says why."""
    monkeypatch.setattr(launch, "ROOT", "/home/me/my project")
    with pytest.raises(UserError, match="a path has a space: move the project from '/home/me/my project'"):
        launch.start_ray(None)


def test_addresses_of_rays_client_are_refused_by_name():
    with pytest.raises(UserError, match="RAY_ADDRESS=ray://head:10001 is Ray's client.*RAY_ADDRESS=auto"):
        launch.join_cluster("ray://head:10001")


def test_the_last_line_of_rays_logs(tmp_path):
    """If Workers do not start, only a log in Ray's folder says why."""
    (tmp_path / "logs").mkdir()
    assert workers.last_line_of_logs(tmp_path) == f"nothing ({tmp_path}/logs)"
    (tmp_path / "logs/raylet.out").write_text("all is well\n")
    (tmp_path / "logs/raylet.err").write_text("first\nbash: /my: No such file or directory\n\n")
    assert workers.last_line_of_logs(tmp_path).startswith("bash: /my: No such file or directory (")


# ---- Whole runs --------------------------------------------------------------------------------------------------


def in_a_terminal(command):
    """Start a command in a terminal of its own. Returns its pid and our end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        # The tests themselves may run in the background or under nohup, which ignore these signals.
        for signum in (signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        os.environ |= {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
        os.chdir(ROOT)
        os.execvp(command[0], command)
    return pid, terminal


def read_until(terminal, condition):
    """Read what the terminal shows until the condition holds or the other end closes."""
    os.set_blocking(terminal, False)
    shown, end = b"", time.monotonic() + DEADLINE
    while not condition() and time.monotonic() < end:
        try:
            shown += os.read(terminal, 4096)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            break
    return shown.decode(errors="replace")


def finished_steps(folder):
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def check_saved(folder):
    steps = metrics(folder)[-1]["step"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{steps}"] and steps >= 3
    assert (folder / "policy/model.safetensors").exists() and (folder / "critic/model.safetensors").exists()


@pytest.mark.soak
def test_ctrl_c_on_a_pipe_into_tee(tmp_path):
    """`tee` ends with the same Ctrl-C. Fails if the steps since the last checkpoint are lost."""
    launched = f"{sys.executable} launch.py configs/tiny.py --workers=2 --critic_updates_per_step=64"
    launched += f" {' '.join(SETTINGS)} --out_dir={tmp_path} --name=a"
    pid, terminal = in_a_terminal(
        ["bash", "-c", f"{launched} 2>&1 | tee {tmp_path}/log; echo status ${{PIPESTATUS[@]}}"]
    )
    shown = read_until(terminal, lambda: finished_steps(tmp_path / "a") >= 3)
    time.sleep(1.5)  # by then the critic's updates have begun
    os.write(terminal, b"\x03")
    shown += read_until(terminal, lambda: False)
    os.waitpid(pid, 0)
    assert "status 130" in shown, shown
    check_saved(tmp_path / "a")


@pytest.mark.soak
def test_a_terminal_that_closes(tmp_path):
    """A connection breaks off. Fails if SIGHUP, or the next printed line, ends the run unsaved."""
    command = [sys.executable, "launch.py", "configs/tiny.py", "--workers=2", *SETTINGS]
    pid, terminal = in_a_terminal([*command, f"--out_dir={tmp_path}", "--name=a"])
    read_until(terminal, lambda: finished_steps(tmp_path / "a") >= 3)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + signal.SIGHUP
    check_saved(tmp_path / "a")


FAILING = """
import sys, launch
from log import Log

def step(self, metrics):
    if metrics["step"] == 3:
        raise OSError(28, "No space left on device")
    return log_step(self, metrics)

log_step, Log.step = Log.step, step
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.soak
def test_a_failed_write_of_the_metrics_saves_the_networks(tmp_path):
    """The disk is full when the metrics are written. Fails if the networks of that step, which are complete, are
    lost."""
    arguments = ["configs/tiny.py", *SETTINGS, f"--out_dir={tmp_path}", "--name=a"]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", FAILING, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the networks of step 3 are saved" in done.stdout
    assert "error: OSError: [Errno 28] No space left on device" in done.stdout.splitlines()[-1]
    assert (tmp_path / "a/checkpoints/step_3").is_dir() and metrics(tmp_path / "a")[-1]["step"] == 2
    code, out, err = run(tmp_path, "--name=a", *SETTINGS, "--steps=4")
    assert code == 0 and "from step 4" in out, out + err


@pytest.mark.soak
def test_samples_that_are_removed(tmp_path):
    """Somebody removes samples/ during a run, to make room on the disk. Fails if that ends the run."""
    process = start(tmp_path, "--name=a", *SETTINGS, "--steps=6")
    wait_for_step(process, tmp_path / "a", 2)
    subprocess.run(["rm", "-r", tmp_path / "a/samples"], check=True)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert (tmp_path / "a/samples/step_6.jsonl").exists()


@pytest.mark.soak
def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    """Fails if a damaged checkpoint is noticed, but loaded all the same."""
    arguments = ["--name=a", *SETTINGS, "--save_every=1"]
    code, out, err = run(tmp_path, *arguments, "--steps=3")
    assert code == 0, out + err
    file = tmp_path / "a/checkpoints/step_3/critic_0.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    code, out, err = run(tmp_path, *arguments, "--steps=4")
    assert code == 0, out + err
    assert "the checkpoint of step 3 is damaged" in out and "from step 3 of 4" in out
    assert [row["step"] for row in metrics(tmp_path / "a")] == [1, 2, 3, 4]
    # The damaged checkpoint, which must not count among those that are kept, was made again when its step was reached.
    assert workers.safetensors_header(file)
