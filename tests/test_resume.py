"""A run that was stopped, killed or broken anywhere ends exactly where an undisturbed one does: bit for bit.

All runs here have the settings of the undisturbed one (test_launch.RUN, conftest.py).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open
from test_launch import (
    DEADLINE,
    ROOT,
    RUN,
    STEPS,
    finish,
    left_behind,
    metrics,
    run,
    start,
    wait_for_step,
    without_timings,
    workers_of,
)


def weights(folder):
    found = {}
    for kind in ("policy", "critic"):
        with safe_open(folder / kind / "model.safetensors", "pt") as file:
            found |= {f"{kind}/{name}": file.get_tensor(name).numpy().tobytes() for name in file.keys()}
    return found


def check_same(folder, undisturbed):
    """Metrics, samples, evaluations, per-token records and final weights are the same."""
    assert without_timings(metrics(folder)) == without_timings(metrics(undisturbed))
    for kind in ("samples", "tokens"):
        for file in sorted((undisturbed / kind).iterdir()):
            assert (folder / kind / file.name).read_bytes() == file.read_bytes(), f"{kind}/{file.name}"
    assert weights(folder) == weights(undisturbed)


STOPS = [  # during the evaluation of step 3, whose updates are done; during step 2, which is given up
    (signal.SIGTERM, "eval", 3),
    pytest.param(signal.SIGINT, "generate", 1, marks=pytest.mark.soak),
]


@pytest.mark.parametrize("signum, phase, reached", STOPS, ids=lambda x: getattr(x, "name", x))
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, undisturbed, signum, phase, reached):
    """Guards against lost work, orphaned processes, and a resume that skips or repeats questions, warms up again, or
    loses moments.

    After the resume, one of the Workers is killed during an update.
    """
    process = start_disturbed(tmp_path, [(phase, signum.name)], "--save_every=-1")
    code, out, err = finish(process)
    assert code == 128 + signum, out + err
    assert f"\nstopped by {signum.name} after step {reached} of {STEPS}: " in out
    assert metrics(tmp_path / "a")[-1]["step"] == reached and not left_behind(process, tmp_path)
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == [f"step_{reached}"]
    assert (tmp_path / "a/policy/model.safetensors").exists()
    code, out, err = run(tmp_path, "--name=a", *RUN, "--seed=2")
    assert code == 2 and "seed=1" in err.splitlines()[-1]
    out = run_disturbed(tmp_path, [("critic", "worker")])
    assert f"from step {reached + 1}" in out and out.count("\nrestart ") == 1, out
    check_same(tmp_path / "a", undisturbed)
    saved = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    assert {"step_5", "step_6"} <= saved and len(saved) <= 3  # the newest two and the best one


@pytest.mark.soak
def test_a_finished_run(tmp_path, undisturbed):
    """A kept checkpoint is exported as the run itself exports it, and the same command again changes nothing.

    The export runs in a folder that holds someone else's reward.py, which no Worker may import.
    """
    shutil.copytree(undisturbed, tmp_path / "a")
    (tmp_path / "reward.py").write_text("raise ImportError")
    done = export(tmp_path / "a", STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    policy = (tmp_path / "a/policy/model.safetensors").read_bytes()
    assert (tmp_path / f"a/policy_step_{STEPS}/model.safetensors").read_bytes() == policy
    template = (tmp_path / "a/policy/chat_template.jinja").read_bytes()
    assert (tmp_path / f"a/policy_step_{STEPS}/chat_template.jinja").read_bytes() == template
    done = export(tmp_path / "a", 77)
    assert done.returncode == 2 and "no checkpoint of step 77; there are [" in done.stderr
    sample = json.loads((tmp_path / "a/samples/step_1.jsonl").read_text().splitlines()[0])
    command = [sys.executable, "-c", CHAT, str(tmp_path / "a/policy"), sample["question"]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | CPU, timeout=DEADLINE)
    assert json.loads(done.stdout.splitlines()[-1]) == sample["prompt_ids"], done.stdout + done.stderr
    code, out, err = run(tmp_path, "--name=a", *RUN)
    assert code == 0 and len(metrics(tmp_path / "a")) == STEPS + 1
    check_same(tmp_path / "a", undisturbed)


STOP_AT_ONCE = """
import os, signal, sys, launch

class Stopped(launch.WorkerGroup):
    def wait(self, phase, refs, interruptible=False):
        if phase == "generate":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().wait(phase, refs, interruptible)

launch.WorkerGroup = Stopped
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.soak
def test_a_stop_before_the_first_update_of_a_resumed_run(tmp_path, undisturbed):
    """The loaded networks have been synced, as networks are after a step's updates. Fails if they count as those of
    the next step, so that a stop waits for updates, or saves them under a step that they have not reached."""
    shutil.copytree(undisturbed, tmp_path / "a")
    arguments = ["configs/tiny.py", f"--out_dir={tmp_path}", "--name=a", *RUN, f"--steps={STEPS + 2}"]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOP_AT_ONCE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=DEADLINE
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert f"\nstopped by SIGTERM after step {STEPS} of {STEPS + 2}: " in done.stdout
    assert max(int(path.name[5:]) for path in (tmp_path / "a/checkpoints").iterdir()) == STEPS


CPU = {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
CHAT = """
import sys, vllm
llm = vllm.LLM(sys.argv[1], max_model_len=128, enforce_eager=True)
out = llm.chat([{"role": "user", "content": sys.argv[2]}], vllm.SamplingParams(max_tokens=1))
print(out[0].prompt_token_ids)
"""


def export(folder, step):
    command = [sys.executable, str(ROOT / "tools/export.py"), str(folder), str(step)]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder.parent, timeout=DEADLINE
    )


DISTURB = """
import json, random, signal, sys, threading, launch, psutil, workers

todo_file, last = sys.argv[1], 0
todo = json.load(open(todo_file))  # phases, and who is killed soon after each has begun, or which signal arrives
rng = random.Random(sum(map(ord, str(todo))))

def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # It has just ended.
        return ""

def disturb(victim):
    mark = {"worker": "ray::Worker", "grader": "reward.py", "everyone": "ray::Worker"}.get(victim)
    found = [p for p in psutil.Process().children(recursive=True) if mark and mark in command_of(p)]
    if victim == "everyone":  # as a cluster's scheduler ends a job
        psutil.Process().terminate()
        return [p.kill() for p in found]
    if victim.startswith("SIG"):
        return psutil.Process().send_signal(signal.Signals[victim])
    (rng.choice(found) if found else psutil.Process()).kill()

class Disturbed(launch.WorkerGroup):
    def start(self, step=None):
        global last
        last = float("inf")
        super().start(step)
        last = self.step

    def wait(self, phase, refs, interruptible=False):
        global last
        if todo and phase == todo[0][0] and self.step > last:  # a second death at the same step ends a run
            last, (_, victim) = self.step, todo.pop(0)
            with open(todo_file, "w") as file:
                json.dump(todo, file)
            threading.Timer(rng.uniform(0, 0.15), disturb, [victim]).start()
        return super().wait(phase, refs, interruptible)

launch.WorkerGroup = Disturbed
sys.exit(launch.main(sys.argv[2:]))
"""


def start_disturbed(tmp_path, todo, *arguments):
    """A run in which somebody is killed, or a signal arrives, soon after each of these phases has begun."""
    (tmp_path / "todo.json").write_text(json.dumps(todo))
    (tmp_path / "disturb.py").write_text(DISTURB)
    command = [sys.executable, str(tmp_path / "disturb.py"), str(tmp_path / "todo.json"), "configs/tiny.py"]
    command += [f"--out_dir={tmp_path}", "--name=a", *RUN, *arguments]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)


def run_disturbed(tmp_path, todo, *arguments):
    """Run to the end and return all that was printed.

    The run restarts by itself. If the driver itself was killed, the same command is given again.
    """
    printed, code = "", -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = start_disturbed(tmp_path, todo, *arguments)
        code, out, err = finish(process, deadline=3 * DEADLINE)  # a restart takes as long as a start
        printed, todo = printed + out + err, json.loads((tmp_path / "todo.json").read_text())
    assert code == 0 and todo == [], printed
    assert not left_behind(process, tmp_path)
    return printed


@pytest.mark.soak
@pytest.mark.parametrize("phases", [["generate", "critic"], ["values", "policy", "sync", "eval"]])
def test_a_worker_killed_in_every_phase(tmp_path, undisturbed, phases):
    """Guards against a death that hangs the run, ends it, or changes what it learns."""
    out = run_disturbed(tmp_path, [(phase, "worker") for phase in phases])
    assert out.count("\nrestart ") == out.count("\nerror: ActorDiedError") == len(phases), out
    check_same(tmp_path / "a", undisturbed)


@pytest.mark.soak
def test_everyone_is_told_to_end(tmp_path, undisturbed):
    """A scheduler ends the Workers along with the driver. Fails if the run takes their death for an accident and
    restarts."""
    process = start_disturbed(tmp_path, [("policy", "everyone")])
    code, out, err = finish(process)
    assert code == 75 and "ActorDiedError" in out and "\nrestart " not in out, out + err
    assert not left_behind(process, tmp_path)
    out = run_disturbed(tmp_path, [])
    check_same(tmp_path / "a", undisturbed)


@pytest.mark.soak
def test_a_stop_while_an_engine_of_two_ranks_generates(tmp_path):
    """The engine's ranks finish generating, so that they stay in step; then the run is saved and ends like any
    other."""
    process = start_disturbed(tmp_path, [("generate", "SIGTERM")], "--tensor_parallel=2")
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM and "\nstopped by SIGTERM after step 1 of " in out, out + err
    assert (tmp_path / "a/policy/model.safetensors").exists() and not left_behind(process, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(9))
def test_random_kills(tmp_path, undisturbed, seed):
    """Twenty-seven deaths of Workers, graders and the driver, at random moments that the other tests do not choose."""
    rng = random.Random(seed)
    phases = ["generate", "values", "critic", "policy", "sync", "save"]
    todo = [(rng.choice(phases), rng.choice(["worker", "worker", "grader", "driver"])) for _ in range(3)]
    run_disturbed(tmp_path, todo)
    check_same(tmp_path / "a", undisturbed)


@pytest.mark.soak
def test_a_hung_worker(tmp_path, undisturbed):
    """Guards against waiting for ever: a Worker that hangs is noticed by its time limit, and killed."""
    process = start(tmp_path, "--name=a", *RUN, "--phase_timeout=100")
    wait_for_step(process, tmp_path / "a", 2)
    workers_of(process)[0].suspend()
    code, out, err = finish(process, deadline=3 * DEADLINE)
    assert code == 0 and "error: PhaseTimeout" in out and "phase_timeout=100 s on rank" in out, out + err
    assert out.count("\nrestart ") == 1 and not left_behind(process, tmp_path)
    check_same(tmp_path / "a", undisturbed)


def test_a_worker_that_ray_kills_for_memory(tmp_path, monkeypatch):
    """Guards against taking this death for an error of the program: a node that was full for a moment must not end the
    run for good."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # of the node's memory: every Worker is over it
    code, out, err = run(tmp_path, "--name=a", *RUN)
    assert code == os.EX_TEMPFAIL and out.count("error: OutOfMemoryError") == 2, out + err
    assert out.count("\nrestart 1 of 100, from step 0") == 1


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk(tmp_path, undisturbed):
    """Guards against half a checkpoint in place of a complete one, and against a run that cannot be continued once
    there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50M", "tmpfs", disk], check=True)
    try:
        code, out, err = run(disk, "--name=a", *RUN, "--keep_checkpoints=9")
        last = out.splitlines()[-1]
        assert code == 1 and last.startswith("error: OSError: a checkpoint takes ") and "left" in last, (
            out + err
        )
        saved = sorted(path.name for path in (disk / "a/checkpoints").iterdir())
        assert saved == ["step_1", "step_2"]
        subprocess.run(["mount", "-o", "remount,size=500M", disk], check=True)
        code, out, err = run(disk, "--name=a", *RUN, "--keep_checkpoints=9")
        assert code == 0 and "from step 3" in out, out + err
        check_same(disk / "a", undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)
