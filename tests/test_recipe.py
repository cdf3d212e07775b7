"""ORZ's recipe around the algorithm: every config against the paper, fetching the questions, mining hard ones."""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_launch import QUICK, metrics, run, without_timings

from configs.load import BASE, ROOT, UserError, load, read_file
from data import prepare
from data.load import load_questions
from tools import plan

ORZ_DATA = Path(os.environ.get("ORZ_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = sorted(
    p
    for p in (ROOT / "configs").glob("*.py")
    if p.stem not in ("__init__", "base", "load", "debug", "eval_only")
)
ORZ = [path for path in CONFIGS if path.stem.startswith("orz_")]

# ORZ's values, with the source of each: the paper (arXiv 2503.24290 v2), a script of its repository at commit 3fdd9a0
# ("playground": orz_7b_ppo.py, and the other sizes where they have the same line; "base": ppo_base_exp.py), or an issue.
RECIPE = {
    "policy_lr": (1e-6, "paper, section 2.3; playground: actor_learning_rate"),
    "critic_lr": (5e-6, "paper, section 2.3; playground: critic_learning_rate"),
    "adam_betas": ([0.9, 0.95], "paper, appendix B"),
    "warmup_steps": (50, "paper, appendix B; playground: num_warmup_steps"),
    "prompts_per_step": (128, "paper, section 2.3; playground: rollout_batch_size"),
    "samples_per_prompt": (64, "paper, section 2.3; playground: n_samples_per_prompt"),
    "policy_updates_per_step": (1, "paper, section 2.3; playground: policy_update_steps"),
    "critic_updates_per_step": (12, "paper, section 2.3; playground: critic_update_steps"),
    "temperature": (1.0, "paper, section 2.3; playground: temperature"),
    "top_p": (1.0, "paper, section 2.3; playground: top_p"),
    "max_prompt_tokens": (2048, "playground: prompt_max_len"),
    "max_response_tokens": (8000, "playground: generate_max_len; for 32B issues 50 and 65"),
    "eval_max_response_tokens": (0, "playground: evaluation uses generate_max_len; for 32B issues 50 and 65"),
    "max_tokens_per_pack": (
        16384,
        "playground: packing_max_len; for 32B and one GPU generate_max_len + prompt_max_len",
    ),
    "stop": (["User:", "Human:", "Assistant:", "</answer>"], "playground: stop"),
    "clip_eps": (0.2, "base: eps_clip"),
    "value_clip": (0.2, "base: value_clip"),
    "max_grad_norm": (1.0, "base: max_norm"),
    "gamma": (1.0, "paper, section 2.2; playground: gamma"),
    "lam": (1.0, "paper, section 2.2; playground: lambd"),
    "kl_coef": (0.0, "paper, section 2.2; playground: init_kl_coef"),
    "critic_model": ("", "playground: critic_pretrain = pretrain: the same base model, weights of its own"),
    "gradient_checkpointing": (True, "base: gradient_checkpointing"),
    "eval_samples": (16, "paper, tables 1 and 4: avg@16"),
    "eval_temperature": (1.0, "playground: evaluation uses temperature"),
    "eval_top_p": (1.0, "playground: evaluation uses top_p"),
    "eval_every": (10, "playground: eval_interval"),
    "save_every": (50, "playground: save_interval"),
    "advantage": ("gae", "paper, section 2.2; playground: use_grpo = False"),
    "lr_decay_steps": (0, "base: constant_with_warmup"),
    "policy_lr_final": (3e-7, "paper, appendix B: of the second stage of 32B"),
}
OF_32B = {"max_response_tokens": 16384, "max_tokens_per_pack": 18432, "eval_max_response_tokens": 32768}
OTHERS = {  # config → what differs from RECIPE
    "orz_0p5b_1gpu": {"max_tokens_per_pack": 10048},
    "orz_32b": OF_32B,
    "orz_32b_anneal": OF_32B
    | {"critic_model": "runs/orz_32b/critic", "warmup_steps": 0, "lr_decay_steps": 100},
    "orz_7b_grpo": {"advantage": "reinforce"},  # issue 75
}
SIZES = {  # config → model, GPUs, tensor parallel, steps, training files
    "orz_0p5b": ("Qwen/Qwen2.5-0.5B", 8, 1, 1000, ["57k"]),
    "orz_0p5b_1gpu": ("Qwen/Qwen2.5-0.5B", 1, 1, 1000, ["57k"]),
    "orz_1p5b": ("Qwen/Qwen2.5-1.5B", 16, 1, 1000, ["57k"]),
    "orz_7b": ("Qwen/Qwen2.5-7B", 32, 1, 1000, ["57k"]),
    "orz_32b": ("Qwen/Qwen2.5-32B", 128, 4, 1100, ["57k", "72k"]),
    "orz_7b_grpo": ("Qwen/Qwen2.5-7B", 32, 1, 1000, ["57k"]),
    "orz_32b_anneal": ("runs/orz_32b/policy", 128, 4, 100, ["13k_hard"]),
    "orz_r1_distill_14b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 64, 2, 300, ["13k_hard"]),
}
# Settings that ORZ's runs do not use, with the values that turn them off.
VARIANTS = {
    "task": "",
    "normalise_advantages": True,
    "critic_lam": 1.0,
    "epochs_per_step": 1,
    "critic_warmup_steps": 0,
    "clip_eps_high": 0.0,
    "loss_average": "token",
    "kl_loss_coef": 0.0,
    "kl_estimator": "k3",
    "update_ref_every": 0,
    "importance_cap": 0.0,
    "importance_token_band": [0.0, 0.0],
    "importance_response_band": [0.0, 0.0],
    "drop_equal_groups": False,
    "drop_cut_off": False,
}
# Settings that say where, on which model and data, how fast and how long a run works, and what it records.
OPERATION = """model train_data eval_data prompt_template trust_remote_code out_dir name seed steps debug dry_run eval_only
    tensor_parallel workers dtype gpu_memory gpu_memory_utilization phase_timeout max_num_seqs max_num_batched_tokens
    on_nonfinite drift_limit max_restarts keep_checkpoints samples_every report_samples
    task_memory_gb wandb""".split()


# ---- Configs ---------------------------------------------------------------------------------------------------


def test_every_size_is_in_the_table():
    """Fails if a config is added and no test checks its numbers."""
    assert [path.stem for path in ORZ] == sorted(SIZES)


def test_every_setting_has_its_place():
    """Fails if a setting is in two of the lists, or in one but no longer in base.py. A setting in none of them must
    keep its value of base.py."""
    placed = [*RECIPE, *VARIANTS, *OPERATION]
    assert len(placed) == len(set(placed)) and set(placed) <= set(read_file(BASE))
    assert all(source for _, source in RECIPE.values())


@pytest.mark.parametrize("name", SIZES)
def test_config_is_orz(name):
    """Fails if one size or base.py has another number than the recipe, or if a file name is not one that prepare.py
    fetches."""
    cfg = load([str(ROOT / "configs" / f"{name}.py")])
    values = {key: value for key, (value, _) in RECIPE.items()}
    assert {key: getattr(cfg, key) for key in RECIPE} == values | OTHERS.get(name, {})
    assert {key: getattr(cfg, key) for key in VARIANTS} == VARIANTS
    for key, value in read_file(BASE).items():  # a setting that a fork has added has its default, off, here
        assert key in [*RECIPE, *VARIANTS, *OPERATION] or getattr(cfg, key) == value, key
    model, workers, tensor_parallel, steps, training = SIZES[name]
    assert (cfg.model, cfg.workers, cfg.tensor_parallel) == (model, workers, tensor_parallel)
    assert (cfg.steps, cfg.name) == (steps, name)
    files = [Path(path).name for path in cfg.train_data + cfg.eval_data]
    held_out = ["aime2024.json", "aime2025.jsonl", "math500.json", "gpqa_diamond.json"]
    assert files == [f"orz_math_{size}.json" for size in training] + held_out
    assert set(files) <= {*prepare.ORZ_FILES, "aime2025.jsonl"}
    assert {str(Path(path).parent)[-8:] for path in cfg.train_data + cfg.eval_data} == {"data/orz"}
    assert cfg.model in plan.SHAPES or cfg.model.startswith("runs/")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_short(path):
    """Fails if a config grows into a copy of base.py with other numbers, in which nobody sees what differs."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    load([str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_debug_shrinks_it(path):
    """Fails if a debug run of minutes still asks for the GPUs, model or data of the long one, or loses the setting
    that is studied."""
    cfg, whole = load([str(path), "--debug=True", "--steps=5"]), load([str(path)])
    assert (cfg.workers, cfg.tensor_parallel, cfg.steps) == (1, 1, 5)  # the command line comes last
    assert cfg.model == str(ROOT / "data/tiny") and cfg.name == f"{path.stem}_debug"
    assert (cfg.advantage, cfg.policy_lr, cfg.lr_decay_steps) == (
        whole.advantage,
        whole.policy_lr,
        whole.lr_decay_steps,
    )


@pytest.mark.parametrize("path", ORZ, ids=lambda path: path.stem)
def test_config_holds_only_what_differs(path):
    """Fails if a line repeats base.py's value: it would stay when base.py is corrected."""
    base = read_file(BASE)
    assert [key for key, value in read_file(path).items() if value == base[key]] == []


@pytest.mark.parametrize("path", ORZ, ids=lambda path: path.stem)
def test_config_says_how_to_run_it(path):
    """Fails if the header is another config's: a command that starts something else, or arithmetic that is not this
    run's."""
    text = path.read_text(encoding="utf-8")
    head, cfg = text.split('"""')[1], load([str(path)])
    assert f"python launch.py configs/{path.name} " in head and "Not run by us." in head
    assert "128 prompts x 64 samples = 8,192 responses" in head
    assert f" {cfg.workers} GPU" in head
    if cfg.tensor_parallel > 1:
        engines = cfg.workers // cfg.tensor_parallel
        assert (
            f"{cfg.workers} GPUs / tensor parallel {cfg.tensor_parallel} = {engines} vLLM engines"
            in " ".join(head.split())
        )


def test_the_page_of_the_sizes_quotes_the_plan():
    """Fails if the page has numbers that tools/plan.py no longer prints."""
    lines = []
    for tensor_parallel in (1, 2, 4):
        cfg = load([str(ROOT / "configs/orz_32b.py"), f"--tensor_parallel={tensor_parallel}"])
        printed = plan.report(cfg, 80.0).splitlines()
        lines += [line for line in printed if re.match(r"(generate|sync): |.*KV cache|vLLM engines", line)]
    page = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "\n".join(lines)


# ---- Variants, as whole runs -----------------------------------------------------------------------------------

WHOLE_RUNS = {  # arguments of a run → metrics that it has beside those of the defaults
    "--critic_warmup_steps=1": [],
    "--epochs_per_step=2 --clip_eps_high=0.28": ["approx_kl"],
    "--lam=0.95 --critic_lam=0.9 --normalise_advantages=False": [],
    "--kl_loss_coef=0.1 --kl_estimator=k2 --update_ref_every=1": ["kl_loss"],
    "--loss_average=response": [],
    "--loss_average=constant": [],
    "--importance_cap=2": ["importance_truncated", "importance_masked"],
    "--importance_token_band=0.5,5": ["importance_truncated", "importance_masked"],
    "--importance_response_band=0.99,1.01": ["importance_truncated", "importance_masked"],
    "--drop_equal_groups=True": [],
    "--drop_cut_off=True": [],
    "--advantage=grpo --loss_average=response": [],
    "--advantage=dr_grpo --loss_average=constant": [],
    "--advantage=rloo": [],
    "--advantage=reinforce": [],
    "--eval_max_response_tokens=120 --eval_every=2": ["eval"],
}


@pytest.mark.soak
@pytest.mark.parametrize("arguments", WHOLE_RUNS)
def test_a_whole_run_with_a_variant(arguments, tmp_path):
    """Fails if a variant, whose formula may be right, stops a run: nobody computes an array that it needs, or loads a
    network."""
    code, out, err = run(tmp_path, "--name=a", *QUICK, "--workers=2", *arguments.split())
    assert code == 0, out + err
    rows = metrics(tmp_path / "a")
    assert all(rows[-1][name] is not None for name in WHOLE_RUNS[arguments])
    assert rows[-1]["grad_norm_policy"] > 0 and rows[-1]["drift_mean"] < 1e-4
    if "warmup" in arguments:
        assert "pg_loss" not in rows[0] and rows[0]["grad_norm_critic"] > 0
    if "--advantage=" in arguments:
        assert "v_loss" not in rows[-1] and not (tmp_path / "a/critic").exists()


@pytest.mark.soak
def test_no_response_is_left_to_train_on(tmp_path):
    """Fails if a step in which all groups have equal rewards ends the run, or counts as an update of the policy."""
    sizes = ["--steps=6", "--prompts_per_step=2", "--samples_per_prompt=2", "--eval_every=-1"]
    code, out, err = run(tmp_path, "--name=a", *sizes, "--drop_equal_groups=True", "--clip_eps_high=0.28")
    assert code == 0, out + err
    assert "clip_eps_high=0.28 has no effect: with one policy update" in out
    rows = metrics(tmp_path / "a")
    without = [row for row in rows if row["policy_samples"] == 0]
    assert without and len(without) < len(rows)
    assert all("pg_loss" not in row and row["grad_norm_critic"] > 0 for row in without)


@pytest.mark.soak
def test_schedules_go_on_where_they_were(tmp_path):
    """Fails if after a resume the critic is trained alone again, warm-up starts again, or the reference is the base
    model."""
    schedule = ["--critic_warmup_steps=2", "--epochs_per_step=2", "--warmup_steps=9"]
    schedule += ["--kl_loss_coef=0.1", "--update_ref_every=2", "--workers=2"]
    whole = run(tmp_path, "--name=whole", *QUICK, *schedule, "--steps=5")
    first = run(tmp_path, "--name=parts", *QUICK, *schedule, "--steps=3")
    second = run(tmp_path, "--name=parts", *QUICK, *schedule, "--steps=5")
    assert [code for code, _, _ in (whole, first, second)] == [0, 0, 0], (whole, first, second)
    rows = without_timings(metrics(tmp_path / "whole"))
    assert rows == without_timings(metrics(tmp_path / "parts"))
    assert [row.get("lr_policy") is None for row in rows] == [True, True, False, False, False]
    rates = [row["lr_policy"] / 5e-4 * 9 for row in rows[2:]]
    assert rates == pytest.approx([1.5, 3.5, 5.5])  # means over updates 1 and 2, 3 and 4, 5 and 6
    assert rows[2]["kl_loss"] > 0  # the second of two updates; the reference is the policy before the first
    weights = [(tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


# ---- Fetching --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A folder, and the address at which this machine serves it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *_):
            pass

        def send_header(
            self, name, value
        ):  # a file named "cut" is announced as twice as long as what is sent
            longer = name == "Content-Length" and "cut" in self.path
            super().send_header(name, str(2 * int(value)) if longer else value)

    (tmp_path / "served" / "eval_data").mkdir(parents=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def dialogues(count):
    return json.dumps(
        [
            [
                {"from": "human", "value": f"{i} + 1?"},
                {"from": "assistant", "ground_truth": {"value": str(i + 1)}},
            ]
            for i in range(count)
        ]
    )


def jsonl(count):
    """Questions as AIME 2025 is stored on the hub: without a newline after the last one."""
    return "\n".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(count))


def test_fetch_all(server, tmp_path, monkeypatch, capsys):
    """Fails if a data set is saved under another name than the configs use, or if a second call fetches everything
    again."""
    folder, address = server
    for theirs, least, _ in prepare.ORZ_FILES.values():
        (folder / theirs).write_text(dialogues(least))
    for theirs in prepare.AIME2025_FILES:
        (folder / theirs).write_text(jsonl(15))
    monkeypatch.setattr(prepare, "ORZ", address)
    monkeypatch.setattr(prepare, "AIME2025", address)
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    assert prepare.main(["orz"]) == 0
    said = capsys.readouterr().out
    fetched = sorted((tmp_path / "data" / "orz").iterdir())
    assert [path.name for path in fetched] == sorted([*prepare.ORZ_FILES, "aime2025.jsonl"])
    aime2025 = tmp_path / "data/orz/aime2025.jsonl"
    assert len(load_questions(str(aime2025))) == 30 and f"{aime2025}: 30 questions" in said
    for path in fetched:
        if path == aime2025:
            continue
        theirs, least, _ = prepare.ORZ_FILES[path.name]
        assert path.read_bytes() == (folder / theirs).read_bytes()
        assert f"{path}: {least:,} questions, {path.stat().st_size:,} bytes" in said
    shutil.rmtree(folder)
    assert prepare.main(["orz"]) == 0  # all files are there, so nothing is fetched
    (tmp_path / "data/orz/math500.json").write_text(dialogues(499))
    assert prepare.main(["orz"]) == 1 and "math500.json" in capsys.readouterr().err


BAD = {
    "missing.json": (None, "cannot be fetched: File not found"),
    "page.json": ("<!DOCTYPE html><html></html>", ":1: broken or truncated JSON"),
    "pointer.json": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "Git LFS pointer",
    ),
    "half.json": (dialogues(10)[:300], "broken or truncated JSON"),
    "few.json": (dialogues(9), "9 questions"),
    "cut.json": (dialogues(10), "cannot be fetched: IncompleteRead"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answer_leaves_nothing(name, server, tmp_path):
    """Fails if an error page, half a file or a Git LFS pointer is kept as a data set."""
    folder, address = server
    content, words = BAD[name]
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError) as error:
        prepare.fetch([f"{address}/{name}"], tmp_path / "new" / "set.json", 10, 10)
    assert f"{address}/{name}" in str(error.value) and words in str(error.value), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_no_connection(tmp_path, monkeypatch, capsys):
    """Fails if a machine without a connection gets a traceback, an empty folder, or exit code 0."""
    monkeypatch.setattr(prepare, "ORZ", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    assert prepare.main(["orz"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "cannot be fetched" in err
    assert list(tmp_path.iterdir()) == []


def test_first_use_fetches(server, tmp_path, monkeypatch):
    """Fails if the first run of an ORZ config only says "cannot be read as UTF-8 text: No such file" instead of
    fetching its data."""
    folder, address = server
    (folder / "eval_data/aime2024.json").write_text(dialogues(30))
    monkeypatch.setattr(prepare, "ORZ", address)
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    (path,) = (path for path in load([str(ROOT / "configs/orz_7b.py")]).eval_data if "aime2024" in path)
    path = f"data/orz/{Path(path).name}"  # as the config has it while nothing has been fetched
    place = prepare.fetched(path)
    assert place == str(tmp_path / path) and len(load_questions(place)) == 30
    shutil.rmtree(folder)
    assert prepare.fetched(place) == place  # the second time the file is there
    for other in ("data/orz/mine.json", "elsewhere/math500.json", f"{tmp_path}/elsewhere/math500.json"):
        assert prepare.fetched(other) == other  # a file of the user's own
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError) as error:
        prepare.fetched(path)
    assert f"{path} is not there" in str(error.value) and "python data/prepare.py orz" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("argv", [[], ["orzz"], ["orz", "57k"], ["--help"]])
def test_bad_usage(argv, capsys):
    """Fails if a misspelt name of a data set ends in a KeyError."""
    assert prepare.main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(not ORZ_DATA.is_dir(), reason=f"no folder {ORZ_DATA}; ORZ_DATA names another")
def test_evaluation_sets_are_as_many_as_expected():
    """Fails if a count in the table would refuse the true file."""
    for name in ("aime2024.json", "math500.json", "gpqa_diamond.json"):
        _, least, most = prepare.ORZ_FILES[name]
        assert least <= len(load_questions(str(ORZ_DATA / name))) <= most


# ---- Mining ----------------------------------------------------------------------------------------------------


def mine(*argv):
    command = [sys.executable, str(ROOT / "data" / "mine_hard.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def write_step(run, step, results, choices=None, rewards=(0.0, 1.0)):
    """samples/step_N.jsonl as log.py writes it. results: question → (attempts, solved); rewards: (if wrong, if
    right)."""
    from types import SimpleNamespace

    import numpy as np

    from data.load import Prompt, Question
    from log import Log, sample_line
    from packing import Sample

    ids = np.array([1, 2], np.int32)
    prompts = [Prompt(ids, Question(name, f"{name}!", choices)) for name in results]
    samples = []
    for i, (attempts, solved) in enumerate(results.values()):
        for k in range(attempts):
            sample = Sample(i, ids, ids, np.zeros(2, np.float32), "text", "stop")
            sample.correct = k < solved
            sample.reward = rewards[sample.correct]
            samples.append(sample)
    (run / "samples").mkdir(parents=True, exist_ok=True)
    for sample in samples:
        sample.line = sample_line(sample, prompts[sample.prompt_index].question)
    Log.lines(
        SimpleNamespace(dir=run, best_effort=lambda what: contextlib.nullcontext()),
        f"step_{step}",
        (sample.line for sample in samples),
    )


def test_hard_questions_of_a_run(tmp_path):
    """A question is hard if it is solved fewer than 4 times in 64 attempts, over all epochs. Fails if the limit is off
    by one, if a question with fewer than 64 attempts counts, or if held-out questions of an evaluation are written."""
    write_step(tmp_path, 2, {"three": (64, 3), "four": (64, 4), "never\u2028 ½": (64, 0)})
    write_step(tmp_path, 10, {"seven of 128": (64, 4), "eight of 128": (64, 4), "too few": (63, 0)})
    write_step(tmp_path, 11, {"seven of 128": (64, 3), "eight of 128": (64, 4)})
    shutil.copy(tmp_path / "samples/step_2.jsonl", tmp_path / "samples/eval_aime2024_0.jsonl")
    done = mine(tmp_path)
    assert done.returncode == 0, done.stderr
    hard = load_questions(str(tmp_path / "hard.jsonl"))
    names = ["three", "never\u2028 ½", "seven of 128"]
    assert [(q.question, q.answer, q.choices) for q in hard] == [(name, f"{name}!", None) for name in names]
    first, second, third = done.stdout.splitlines()
    assert first.startswith("6 questions, 1 of them with fewer than 64 attempts")
    assert second == "3 of the other 5 were solved fewer than 4 times in 64, 1 never"
    assert str(tmp_path / "hard.jsonl") in third
    done = mine(tmp_path, "--fewer_than=5", "--of=63", f"--out={tmp_path}/more.jsonl")
    assert done.returncode == 0 and len(load_questions(str(tmp_path / "more.jsonl"))) == 6


def test_rewards_do_not_say_what_is_right(tmp_path):
    """Fails if, in a run with rewards of its own, a wrong answer that is rewarded for its form counts as solved, or a
    right one with a penalty as failed."""
    paid = {"question": "paid for its form", "answer": "1", "reward": 0.3, "correct": False}
    late = {"question": "right, but too long", "answer": "1", "reward": -0.5, "correct": True}
    older = {"question": "of an older version", "answer": "1", "reward": 1.0}
    (tmp_path / "samples").mkdir()
    lines = [json.dumps(row) + "\n" for row in (paid, late, older) for _ in range(64)]
    (tmp_path / "samples/step_1.jsonl").write_text("".join(lines))
    assert mine(tmp_path).returncode == 0
    assert [q.question for q in load_questions(str(tmp_path / "hard.jsonl"))] == ["paid for its form"]


@pytest.mark.parametrize("rewards", [(0.3, 1.3), (-0.5, 0.5), (0.3, -0.5)])
def test_the_verdict_decides_and_not_the_reward(rewards, tmp_path):
    """Fails if with partial credit or a penalty for length every question counts as solved, or none does."""
    write_step(tmp_path, 1, {"three": (64, 3), "four": (64, 4), "never": (64, 0)}, rewards=rewards)
    done = mine(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [q.question for q in load_questions(str(tmp_path / "hard.jsonl"))] == ["three", "never"]
    assert done.stdout.splitlines()[1] == "2 of the other 3 were solved fewer than 4 times in 64, 1 never"


def test_choices_survive(tmp_path):
    """Fails if a multiple-choice question loses its choices, so that its letter would be graded as a formula."""
    question = "Which? A. this B. that"
    write_step(tmp_path, 1, {question: (64, 0)}, {f"{question}!": "this", "B": "that"})
    assert mine(tmp_path).returncode == 0
    assert load_questions(str(tmp_path / "hard.jsonl"))[0].choices == {f"{question}!": "this", "B": "that"}


def test_mining_errors_are_one_line(tmp_path):
    """Fails if a run without samples, a broken line or a misspelt option ends in a traceback or in an empty training
    file."""
    (tmp_path / "broken/samples").mkdir(parents=True)
    whole = '{"question": "q", "answer": "a", "correct": false, "reward": 0.0}\n'
    (tmp_path / "broken/samples/step_1.jsonl").write_text(whole + '{"quest')
    write_step(tmp_path / "easy", 1, {"q": (64, 64)})
    for argv, code, words in [
        ([], 2, "usage"),
        ([tmp_path / "easy", "--fewer_then=3"], 2, "'--fewer_then=3'"),
        ([tmp_path / "easy", "--of=none"], 2, "whole numbers"),
        ([tmp_path / "none"], 1, "is no run"),
        ([tmp_path / "broken"], 1, "step_1.jsonl:2: no sample"),
        ([tmp_path / "easy"], 1, "nothing to write"),
        ([tmp_path / "easy", "--fewer_than=65", f"--out={tmp_path}/no/such/file"], 1, "cannot write"),
    ]:
        done = mine(*argv)
        assert done.returncode == code and words in done.stderr, done
        assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("hard.jsonl*"))
