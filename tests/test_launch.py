"""Whole runs from the command line, on real Ray, vLLM and DeepSpeed; and the ways in which a run ends."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_models

import launch
import workers

ROOT = Path(__file__).resolve().parent.parent
QUICK = [
    "--steps=2",
    "--prompts_per_step=8",
    "--samples_per_prompt=8",
    "--eval_every=-1",
    "--max_response_tokens=48",
]
STEPS = 6
RUN = [  # for the fixture `undisturbed`: six steps of the demo on two Workers, with a checkpoint after each
    f"--steps={STEPS}",
    "--workers=2",
    "--prompts_per_step=8",
    "--samples_per_prompt=8",
    "--max_response_tokens=48",
    "--eval_every=3",
    "--eval_samples=1",
    "--save_every=1",
]
DEADLINE = 300  # seconds, ten times what a quick run takes here


def start(tmp_path, *arguments, config="configs/tiny.py", cwd=ROOT):
    """Start a run in the background, on a Ray of its own."""
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        str(ROOT / config),
        f"--out_dir={tmp_path}",
        *arguments,
    ]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment)


def finish(process, deadline=DEADLINE):
    """Exit code, stdout and stderr of a run. A run that hangs fails the test, which shows what had been printed."""
    try:
        out, err = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"no end within {deadline} s:\n{out}\n{err}")
    return process.returncode, out, err


def run(tmp_path, *arguments, **options):
    return finish(start(tmp_path, *arguments, **options))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timings(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def left_behind(process, folder):
    """The processes whose command line or environment mentions the run's folder, once there is none or a minute has
    passed."""
    deadline = time.monotonic() + 60
    while True:
        found = []
        for other in psutil.process_iter(["pid", "cmdline", "environ"]):
            text = " ".join(other.info["cmdline"] or []) + str(other.info["environ"] or "")
            if str(folder) in text and other.pid not in (os.getpid(), process.pid):
                found.append(other.info["cmdline"])
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def wait_for_step(process, folder, step):
    """Wait until the run has finished that step."""
    deadline = time.monotonic() + DEADLINE
    while not (folder / "metrics.jsonl").exists() or not any(row["step"] >= step for row in metrics(folder)):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)


def workers_of(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # The process may have ended meanwhile.
            if "ray::Worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_two_workers_learn_and_leave_everything(undisturbed):
    """Guards the whole: two ranks, from the command to the folders, with an accuracy that goes up."""
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[6]["eval"]["eval"]["accuracy"] > rows[0]["eval"]["eval"]["accuracy"] + 0.1
    assert rows[6]["response_tokens"] > rows[1]["response_tokens"]
    seconds = sum(rows[6]["seconds"].values()) - rows[6]["seconds"]["eval"]  # evaluation is not training
    assert rows[6]["tokens_per_second"] == pytest.approx(rows[6]["tokens"] / seconds, rel=1e-3)
    named = "reward response_tokens cut_off entropy clipfrac_low clipfrac_high approx_kl pg_loss v_loss explained_var "
    named += "grad_norm_policy grad_norm_critic drift_mean drift_max tokens_per_second seconds"
    for row in rows[1:]:
        assert set(named.split()) <= set(row)
        assert row["approx_kl"] is None and row["clipfrac_low"] is None  # the ratio is 1 by construction
        assert row["drift_mean"] < 1e-4 and row["update_kl"] > 0
    for file in (
        "config.json",
        "curves.png",
        "samples/step_1.jsonl",
        "tokens/step_1.npz",
        "policy/config.json",
        "critic/config.json",
    ):
        assert (undisturbed / file).stat().st_size > 0, file
    assert list((undisturbed / "tensorboard").iterdir())
    samples = [json.loads(line) for line in open(undisturbed / "samples/step_1.jsonl")]
    assert {"question", "response", "response_ids", "reward", "finish_reason"} <= set(samples[0])
    graded = [sample["graded"] for sample in samples]
    assert "by_number" in graded and rows[1]["cut_off"] == graded.count("cut_off") / len(graded)
    check_exports(undisturbed)
    code, out, err = run(undisturbed.parent, f"--name={undisturbed.name}")
    other = "max_response_tokens=48, prompts_per_step=8, samples_per_prompt=8, workers=2:"
    assert code == 2 and f"is a run with {other}" in err.splitlines()[-1]  # nothing is overwritten


def check_exports(folder):
    """Plain transformers loads the policy as a causal language model, and the critic as a backbone."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    policy, loading = AutoModelForCausalLM.from_pretrained(folder / "policy", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    _, loading = AutoModel.from_pretrained(folder / "critic", output_loading_info=True)
    assert not loading["missing_keys"] and set(loading["unexpected_keys"]) == {"value_head.weight"}
    prompt = AutoTokenizer.from_pretrained(folder / "policy")(
        "User: 123+456\nAssistant: <think>", return_tensors="pt"
    )
    assert torch.isfinite(policy(prompt["input_ids"]).logits).all()
    sample = json.loads((folder / "samples/step_1.jsonl").read_text().splitlines()[0])
    chat = [{"role": "user", "content": sample["question"]}]
    # The exported chat template gives the prompts that the policy was trained on.
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert list(ids) == sample["prompt_ids"]


def test_tensor_parallel_with_a_penalty_and_two_updates(tmp_path):
    """Guards the paths that the demo leaves out: tensor parallel 2, a reference model, old log-probs, clipping."""
    code, out, err = run(
        tmp_path, "--name=a", *QUICK, "--workers=2", "--tensor_parallel=2", "--kl_coef=0.01",
        "--policy_updates_per_step=2", "--policy_lr=1e-3",
    )  # fmt: skip
    assert code == 0, out + err
    row = metrics(tmp_path / "a")[-1]
    assert row["drift_mean"] < 1e-4
    assert row["approx_kl"] > 0 and row["clipfrac_low"] is not None


def test_any_config_in_debug_mode(tmp_path):
    """Guards the ablations: a config of 32 GPUs, here one without a critic, runs in a minute on the demo's model.

    It is started in a folder of somebody's experiments, whose modules the Workers must not import.
    """
    here = tmp_path / "a [folder] of mine"
    for module in ("reward", "workers", "model", "log", "data/load", "configs/load", "numpy/__init__"):
        file = here / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise SystemExit('{module} of the current folder')")
    code, out, err = run(tmp_path, "--debug=True", "--name=a", config="configs/orz_7b_grpo.py", cwd=here)
    assert code == 0, out + err
    rows = metrics(tmp_path / "a")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3]["grad_norm_policy"] > 0
    assert (tmp_path / "a/policy/model.safetensors").exists() and not (tmp_path / "a/critic").exists()
    assert "values" not in rows[3]["seconds"] and "v_loss" not in rows[3]


def test_workers_compare_every_module_of_the_project():
    """Fails if the Workers import a new module that is not compared between nodes: another version of it on some node
    would go unnoticed."""
    script = "import sys, workers, ppo, rollout, packing, data.load; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    own = set()
    for folder in (".", "configs", "data", "tools"):
        for file in (ROOT / folder).glob("*.py"):
            own.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    grading = {"equality", "own_task"}  # imported by the grading processes that the Workers start
    assert own & set(done.stdout.split()) | grading == set(workers.MODULES)


@pytest.mark.soak
def test_a_dead_worker_ends_the_run(tmp_path):
    """Guards against waiting for ever: if a Worker is killed, the error is named, the exit code is not 0, and no
    process is left."""
    process = start(tmp_path, "--name=a", *QUICK, "--steps=1000", "--workers=2", "--max_restarts=0")
    wait_for_step(process, tmp_path / "a", 1)
    workers_of(process)[0].kill()
    code, out, err = finish(process)
    assert code == 75, out + err  # EX_TEMPFAIL tells a batch system to try again
    assert out.splitlines()[-1].startswith("error: ActorDiedError")
    assert not left_behind(process, tmp_path)


GONE = """
import contextlib, sys, launch, psutil
from configs.load import UserError

class Gone(launch.WorkerGroup):
    places = 0

    def place(self):
        Gone.places += 1
        if Gone.places > 1:
            raise UserError("workers=1: Ray has 0 CPUs")
        super().place()

    def finish_step(self):
        super().finish_step()
        if self.step == 2:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # It may have ended meanwhile.
                    if "ray::Worker" in " ".join(process.cmdline()):
                        process.kill()

launch.WorkerGroup = Gone
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.soak
def test_a_restart_that_finds_too_few_machines(tmp_path):
    """Guards a week's work: if a machine leaves for good, the restart that misses it must not remove the run's folder
    with its checkpoints."""
    arguments = [
        "configs/tiny.py",
        f"--out_dir={tmp_path}",
        "--name=a",
        *QUICK,
        "--steps=6",
        "--save_every=1",
    ]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", GONE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=DEADLINE
    )
    assert done.returncode == 2 and "restart 1 of " in done.stdout, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "error: workers=1: Ray has 0 CPUs"
    assert [row["step"] for row in metrics(tmp_path / "a")] == [1, 2]
    assert (tmp_path / "a/checkpoints/step_1/policy_0.safetensors").exists()


STALE = """
import sys, launch, workers

class Stale(workers.Worker):
    def sync(self):
        for _ in self.learners["policy"].weights():
            pass  # gathered as always, and thrown away
        self.gpu_owner = "rollout"

workers.Worker = Stale
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
def test_a_stale_sync_stops_the_run(tmp_path, dtype):
    """Guards against months of sampling from old weights (TRL#5312): the next step notices it before it trains on the
    samples."""
    arguments = [
        "configs/tiny.py",
        f"--out_dir={tmp_path}",
        "--name=a",
        *QUICK,
        f"--dtype={dtype}",
        "--policy_lr=1e-2",
    ]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STALE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=DEADLINE
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stale weights" in done.stdout.splitlines()[-1]
    assert [row["step"] for row in metrics(tmp_path / "a")] == [1]


BAD_INPUT = {
    "no config": (["configs/none.py"], "configs/none.py"),
    "unknown setting": (["configs/tiny.py", "--polcy_lr=1"], "policy_lr"),
    "wrong type": (["configs/tiny.py", "--steps=many"], "steps"),
    "impossible combination": (["configs/tiny.py", "--workers=3", "--tensor_parallel=2"], "tensor_parallel"),
    "no data file": (["configs/tiny.py", "--train_data=none.jsonl"], "none.jsonl"),
    "broken line": (["configs/tiny.py", "--train_data={tmp}/broken.jsonl"], "broken.jsonl"),
    "empty data": (["configs/tiny.py", "--train_data={tmp}/empty.jsonl"], "empty.jsonl"),
    "no model": (["configs/tiny.py", "--model=./none"], "./none"),
    "read-only runs": (["configs/tiny.py", "--out_dir=/proc/runs"], "/proc/runs"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_before_torch(tmp_path, case):
    """Guards the newcomer: one line that names what is wrong, exit code 2, and nothing heavy imported."""
    (tmp_path / "broken.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+')
    (tmp_path / "empty.jsonl").write_text("")
    arguments, expected = BAD_INPUT[case]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    program = "import sys, launch; code = launch.main(sys.argv[1:]); assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    command = [sys.executable, "-c", program + "; sys.exit(code)", *arguments]
    if "out_dir" not in str(arguments):
        command.append(f"--out_dir={tmp_path}/runs")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and expected in done.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_prompts_over_the_limit(tmp_path):
    """Guards against a start on nothing: a run whose prompts are all too long ends in one line."""
    code, out, err = run(tmp_path, "--max_prompt_tokens=3")
    assert code == 2 and "max_prompt_tokens=3" in err.splitlines()[-1] and "Traceback" not in out + err


def test_too_many_workers(tmp_path):
    """Guards against waiting for machines that are not there."""
    code, out, err = run(tmp_path, "--workers=4000")
    assert code == 2 and "4000" in err.splitlines()[-1] and "Traceback" not in out + err


@pytest.mark.soak
def test_code_in_a_model_folder_runs_only_when_trusted(tmp_path, monkeypatch):
    """Fails if a model folder's Python code runs because the model was named, or if with --trust_remote_code=True the
    run does without that code."""
    monkeypatch.setenv("REMOTE_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "data/tiny", folder, ignore=shutil.ignore_patterns("*.jsonl"))
    tiny_models.bring_code(folder)
    code, out, err = run(tmp_path, f"--model={folder}", *QUICK)
    assert code == 2 and "trust_remote_code=True" in err.splitlines()[-1], out + err
    assert "Traceback" not in out + err and not (tmp_path / "ran").exists()
    code, out, err = run(tmp_path, f"--model={folder}", *QUICK, "--trust_remote_code=True", "--name=trusted")
    assert code == 0, out + err
    assert (tmp_path / "ran").exists() and metrics(tmp_path / "trusted")[-1]["drift_mean"] < 1e-4


def test_never_twice_from_the_same_checkpoint():
    """Guards against endless restarts: a death that is caused by the data would come back after each."""
    assert launch.may_restart([], 0, max_restarts=2)
    assert not launch.may_restart([0], 0, max_restarts=2)
    assert launch.may_restart([0], 3, max_restarts=2)
    assert not launch.may_restart([0, 3], 5, max_restarts=2)  # both restarts are used up
    assert not launch.may_restart([], 0, max_restarts=0)
