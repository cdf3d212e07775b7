"""Broken inputs and hostile machines: each ends in one line that says what is wrong, and leaves nothing behind.

All cases are in two tables and run from the command line: what is refused before torch is imported in `make test`, the
rest in `make soak`. Each case guards another rule.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from test_launch import DEADLINE, ROOT, left_behind

from configs.load import load
from data.content import run_content
from log import Log

GOOD = '{"question": "1+1", "answer": "2"}\n'
TINY = ROOT / "data/tiny"


def model_with(tmp, change):
    """A copy of the demo's model to which `change(folder)` has been applied; returns the argument that names it."""
    folder = tmp / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    change(folder)
    return f"--model={folder}"


def edit_json(file, **changes):
    def change(folder):
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def without_end_token(folder):
    edit_json("config.json", eos_token_id=None)(folder)
    edit_json("tokenizer_config.json", eos_token=None)(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def file_with(name, content):
    def make(tmp):
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp / name

    return make


def data(content, setting="train_data"):
    return lambda tmp: [f"--{setting}={file_with('mine.jsonl', content)(tmp)}"]


def config(text):
    return lambda tmp: [str(file_with("mine.py", text)(tmp))]


def folder(tmp, name, *files):
    (tmp / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        (tmp / name / file).write_text("{}")
    return tmp / name


def other_run(tmp):
    """Make the folder of a run with another seed, as Log makes it."""
    out_dir = f"--out_dir={tmp}/runs"
    cfg = load([str(ROOT / "configs/tiny.py"), "--seed=7", out_dir])
    cfg.critic_model = cfg.model
    cfg.content = run_content(cfg)
    Log(cfg).metrics.close()
    return ["configs/tiny.py"]


def older_run(tmp):
    shutil.copytree(ROOT / "tests/old_run", tmp / "runs/tiny")
    return ["configs/tiny.py"]


def cut(file, size):
    def change(folder):
        os.truncate(folder / file, size)

    return change


# Cases refused in about a second: arguments (a list, or a function of the test's folder), and words of the last line.
LIGHT = {
    "nothing at all": ([], "config file comes first"),
    "settings without a config": (["--steps=3"], "config file comes first"),
    "no such config": (["configs/none.py"], "does not exist"),
    "a folder for a config": (["configs"], "does not exist"),
    "config with broken syntax": (config("steps = ("), "SyntaxError"),
    "config that fails": (config("steps = 1 / 0"), "ZeroDivisionError"),
    "config that exits": (config("import sys\nsys.exit(3)"), "SystemExit"),
    "config that imports what is not there": (config("import nothing_there"), "nothing_there"),
    "config of bytes": (config(b"\xff\xfe\x00"), "mine.py"),
    "unknown setting in a config": (config("stepz = 3"), "did you mean steps?"),
    "wrong type in a config": (config("steps = '3'"), "whole number"),
    "config without a model": (config("steps = 3\ntrain_data = ['a']"), "model"),
    "config without questions": (config("model = 'data/tiny'"), "train_data"),
    "unknown setting": (["configs/tiny.py", "--polcy_lr=1"], "did you mean policy_lr?"),
    "no equals sign": (["configs/tiny.py", "--steps"], "--key=value"),
    "wrong type": (["configs/tiny.py", "--steps=many"], "whole number"),
    "text for a switch": (["configs/tiny.py", "--debug=yes"], "True or False"),
    "no steps": (["configs/tiny.py", "--steps=0"], "steps > 0"),
    "negative seed": (["configs/tiny.py", "--seed=-1"], "seed"),
    "temperature 0": (["configs/tiny.py", "--temperature=0"], "temperature"),
    "learning rate of 2": (["configs/tiny.py", "--policy_lr=2"], "policy_lr"),
    "betas of 1": (["configs/tiny.py", "--adam_betas=0.9,1"], "adam_betas"),
    "half an engine": (["configs/tiny.py", "--workers=3", "--tensor_parallel=2"], "tensor_parallel=2"),
    "packs too small": (["configs/tiny.py", "--max_tokens_per_pack=99"], "max_tokens_per_pack=99"),
    "more updates than responses": (["configs/tiny.py", "--critic_updates_per_step=9999"], "critic_updates_per_step"),
    "nucleus with a drift check": (["configs/tiny.py", "--top_p=0.9"], "drift_limit"),
    "empty stop string": (["configs/tiny.py", "--stop=['']"], "stop"),
    "template without a place": (["configs/tiny.py", "--prompt_template=hello"], "{question}"),
    "unknown dtype": (["configs/tiny.py", "--dtype=float8"], "float8"),
    "no checkpoint kept": (["configs/tiny.py", "--keep_checkpoints=0"], "keep_checkpoints"),
    "name with a slash": (["configs/tiny.py", "--name=a/b"], "name"),
    "two sets of one name": (
        ["configs/tiny.py", "--eval_data=data/tiny/eval.jsonl,other/eval.json"],
        "no two files may have the same name",
    ),
    "no data file": (["configs/tiny.py", "--train_data=none.jsonl"], "none.jsonl"),
    "no evaluation file": (["configs/tiny.py", "--eval_data=none.jsonl"], "none.jsonl"),
    "a folder for data": (["configs/tiny.py", "--train_data=data/tiny"], "Is a directory"),
    "empty data": (data(""), "holds no questions"),
    "truncated line": (data(GOOD + '{"question": "2+'), "mine.jsonl:2"),
    "truncated list": (data('[{"question": "1", "answer": "1"}, {'), "mine.jsonl:1"),
    "no answer": (data('{"question": "1+1"}'), "item 1"),
    "empty answer": (data(GOOD + '{"question": "1+1", "answer": " "}'), "item 2"),
    "number for an answer": (data('{"question": "1+1", "answer": 2}'), "must be a text"),
    "half a character": (data('{"question": "\\ud800", "answer": "2"}'), "must be a text"),
    "three messages": (data('[[{"value": "a"}, {"value": "b"}, {"value": "c"}]]'), "item 1"),
    "answer that is no choice": (
        data('{"question": "a", "answer": "E", "choices": {"A": "1"}}', "eval_data"),
        "none of the choices",
    ),
    "Latin-1": (data('{"question": "é", "answer": "2"}'.encode("latin-1")), "UTF-8"),
    "a picture": (data(b"\x89PNG\r\n\x1a\n\x00\x00"), "UTF-8"),
    "no model folder": (["configs/tiny.py", "--model=./none"], "./none"),
    "empty model folder": (lambda tmp: ["configs/tiny.py", f"--model={folder(tmp, 'm')}"], "config.json"),
    "model without weights": (
        lambda tmp: ["configs/tiny.py", f"--model={folder(tmp, 'm', 'config.json')}"],
        "*.safetensors",
    ),
    "pickled weights": (
        lambda tmp: ["configs/tiny.py", f"--model={folder(tmp, 'm', 'config.json', 'pytorch_model.bin')}"],
        "*.safetensors",
    ),
    "no critic folder": (["configs/tiny.py", "--critic_model=./none"], "critic_model"),
    "hub name without a connection": (["configs/tiny.py", "--model=nobody/nothing"], "it cannot be fetched from the hub"),
    "runs/ cannot be made": (["configs/tiny.py", "--out_dir=/proc/runs"], "--out_dir"),
    "runs/ is a file": (lambda tmp: ["configs/tiny.py", f"--out_dir={file_with('f', '')(tmp)}"], "--out_dir"),
    "a folder that is no run": (
        lambda tmp: [f"--out_dir={folder(tmp, 'runs/tiny', 'thesis.tex').parent}"],
        "is no run",
    ),
    "another run's folder": (other_run, "seed=7"),
    "an older version's run": (older_run, "begun by an older version of nanoORZ"),
}  # fmt: skip

# Cases refused only after transformers, Ray or vLLM has been imported.
HEAVY = {
    "prompts all too long": (["configs/tiny.py", "--max_prompt_tokens=3"], "max_prompt_tokens=3"),
    "chat without a chat template": (["configs/tiny.py", "--prompt_template=chat"], "no chat template"),
    "more workers than there are": (["configs/tiny.py", "--workers=4000"], "4000"),
    "config.json cut short": (lambda tmp: [model_with(tmp, cut("config.json", 40))], "config"),
    "tokenizer missing": (
        lambda tmp: [model_with(tmp, lambda f: (f / "tokenizer.json").unlink())],
        "okenizer",
    ),
    "tokenizer cut short": (
        lambda tmp: [model_with(tmp, cut("tokenizer.json", 99))],
        "cannot read its tokenizer",
    ),
    "no end token": (lambda tmp: [model_with(tmp, without_end_token)], "end token"),
    "tokens without weights": (
        lambda tmp: [model_with(tmp, edit_json("config.json", vocab_size=7))],
        "vocab_size=7",
    ),
    "weights cut short": (
        lambda tmp: [model_with(tmp, cut("model.safetensors", 1000))],
        "not a whole safetensors file",
    ),
    "weights of another shape": (
        lambda tmp: [model_with(tmp, edit_json("config.json", hidden_size=64))],
        "[106, 64] by config.json",
    ),
    "architecture unknown": (
        lambda tmp: [
            model_with(tmp, edit_json("config.json", model_type="nothing", architectures=["Nothing"]))
        ],
        "nothing",
    ),
    "heads that tensor parallel does not divide": (
        ["configs/tiny.py", "--workers=3", "--tensor_parallel=3", "--steps=1"],
        "cannot be shared by tensor_parallel=3",
    ),
    "a Ray that does not answer": (["configs/tiny.py"], "RAY_ADDRESS=local"),
}


def check(tmp_path, arguments, expected, **environment):
    arguments = arguments(tmp_path) if callable(arguments) else list(arguments)
    if arguments and arguments[0].startswith("--") and arguments[0] != "--steps=3":
        arguments = ["configs/tiny.py", *arguments]
    if len(arguments) > 0 and not any(argument.startswith("--out_dir") for argument in arguments):
        arguments.append(f"--out_dir={tmp_path}/runs")
    before = sorted(path for path in tmp_path.rglob("*"))
    environment = (
        os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | environment
    )
    process = subprocess.Popen(
        [sys.executable, "launch.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    out, err = process.communicate(timeout=DEADLINE)
    last = (err if process.returncode == 2 else out).strip().splitlines()[-1]
    assert process.returncode in (1, 2), out + err
    assert last.startswith("error: ") and expected in last, out + err
    assert "Traceback" not in out + err
    assert not left_behind(process, tmp_path)
    if process.returncode == 2:  # refused before it began: there must not be one file more or less
        assert sorted(path for path in tmp_path.rglob("*")) == before
    return process.returncode


@pytest.mark.parametrize("case", LIGHT)
def test_refused_at_once(tmp_path, case):
    """Each case of LIGHT ends with exit code 2 and its words in the last line, and changes no file."""
    assert check(tmp_path, *LIGHT[case]) == 2


@pytest.mark.soak
@pytest.mark.parametrize("case", HEAVY)
def test_refused_after_a_look(tmp_path, case):
    """Each case of HEAVY ends with its words in the last line, without a traceback or a process left behind."""
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    check(tmp_path, *HEAVY[case], **({"RAY_ADDRESS": address} if "Ray" in case else {}))


def test_there_are_sixty():
    assert len(LIGHT) + len(HEAVY) >= 60
