"""Settings: everything in base.py is documented, enforced and used, and whatever is wrong is one clear line."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import (
    BASE,
    MAY_CHANGE,
    MAY_MOVE,
    ROOT,
    UserError,
    documentation,
    load,
    read_file,
    without_effect,
)
from tools.plan import derived, describe

TINY = str(ROOT / "configs" / "tiny.py")
OTHERS = ("__init__", "base", "load", "eval_only")  # the last is no whole config
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem not in OTHERS]
GOOD = 'model = "m"\ntrain_data = ["t"]\n'
SOURCES = (
    "tools/plan.py",
    "launch.py",
    "workers.py",
    "packing.py",
    "ppo.py",
    "rollout.py",
    "model.py",
    "reward.py",
    "log.py",
    "data/load.py",
    "data/models.py",
    "configs/load.py",
)


def config(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def error_of(argv):
    with pytest.raises(UserError) as caught:
        load(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- base.py ---------------------------------------------------------------------------------------------------


def test_every_setting_is_documented():
    """A formatter wraps a long line, and the comment with the rule in it is lost in silence."""
    base, words = read_file(BASE), documentation()
    assert list(base) == list(words)
    for key, value in base.items():
        comment, legal = words[key]
        assert comment
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert re.search(r"\bx\b", legal), f"{key} is a number, but nothing says which are legal"


@pytest.mark.parametrize("key", read_file(BASE))
def test_every_setting_is_read(key):
    """A setting that nothing reads: the user turns a knob that is connected to nothing."""
    text = "\n".join((ROOT / source).read_text() for source in SOURCES)
    assert re.search(rf'cfg\.{key}\b|"{key}"', text)


def test_recipe_is_orz():
    """A default drifts away from the paper's while someone tunes the demo."""
    base = read_file(BASE)
    recipe = {"policy_lr": 1e-6, "critic_lr": 5e-6, "adam_betas": [0.9, 0.95], "warmup_steps": 50}
    recipe |= {"prompts_per_step": 128, "samples_per_prompt": 64, "temperature": 1.0, "top_p": 1.0}
    recipe |= {"max_prompt_tokens": 2048, "max_response_tokens": 8000, "clip_eps": 0.2, "value_clip": 0.2}
    recipe |= {"max_grad_norm": 1.0, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "eval_samples": 16}
    recipe |= {"critic_updates_per_step": 12, "policy_updates_per_step": 1}
    recipe |= {"stop": ["User:", "Human:", "Assistant:", "</answer>"]}
    assert {key: base[key] for key in recipe} == recipe
    template = base["prompt_template"].encode()  # of ../shared/data/orz_prompt.txt
    digest = "b10b7ae1199f067e6064e641294a96a1bdf7402a254e150d6cbbdc5cd2ecac3c"
    assert hashlib.sha256(template).hexdigest() == digest


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    """A setting was renamed in base.py, and a config that nobody ran today still has the old name."""
    cfg = load([str(path)])
    assert cfg.name == path.stem
    assert set(vars(cfg)) == set(read_file(BASE))
    assert all(Path(file).is_file() for file in cfg.train_data + cfg.eval_data if "tiny" in file)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_evaluates_alone(path):
    """--eval_only=True in a file changes nothing but its name, and the run trains; or a config's own settings win."""
    cfg = load([str(path), "--eval_only=True", "--eval_data=a.jsonl"])
    assert (cfg.name, cfg.steps, cfg.train_data, cfg.kl_coef) == (f"{path.stem}_eval_only", 0, [], 0)


# ---- What is accepted ----------------------------------------------------------------------------------------------


def test_command_line_comes_last_and_values_keep_their_type(tmp_path):
    """--steps=3 becomes "3", a stop string with = or a comma in it is cut, 1 is refused where 1.0 is meant."""
    path = config(tmp_path, GOOD + "steps = 5\ntemperature = 1\n")
    more = ["--steps=7", "--steps=9", "--stop=a=b,c", "--gamma=1", "--policy_lr=2e-5", "--debug=False"]
    cfg = load([path, *more, "--name=1", "--adam_betas=0,0.9", "--eval_data=", "--drift_limit=-1"])
    assert (cfg.steps, cfg.stop, cfg.gamma, cfg.policy_lr, cfg.debug) == (9, ["a=b", "c"], 1, 2e-5, False)
    assert (cfg.name, cfg.adam_betas, cfg.eval_data, cfg.temperature) == ("1", [0, 0.9], [], 1)
    assert load([path, "--stop=['a,b', 'c']"]).stop == ["a,b", "c"]
    assert load([path, "--stop=[]"]).stop == []


def test_config_may_start_from_another(tmp_path):
    """Modules, functions and classes that a config uses are taken for settings; an import hides a setting."""
    text = "import math\nfrom pathlib import Path\nfrom configs.tiny import *\n_half = 2\ndef double(x): return 2 * x\n"
    cfg = load([config(tmp_path, text + "steps = double(_half) + int(math.sqrt(9))\n")])
    assert cfg.steps == 7 and cfg.name == "mine"
    assert cfg.prompts_per_step == read_file(TINY)["prompts_per_step"]


def test_paths(tmp_path, monkeypatch):
    """A run that is started in another folder does not find the demo's model, or trains on a namesake's."""
    monkeypatch.chdir(tmp_path)
    assert load([TINY]).model == str(ROOT / "data/tiny")
    (tmp_path / "data/tiny").mkdir(parents=True)
    cfg = load([TINY, "--critic_model=Qwen/Qwen2.5-7B", "--eval_data=no/such.json"])
    assert cfg.model == str(tmp_path / "data/tiny")  # here comes first
    assert (cfg.critic_model, cfg.eval_data) == ("Qwen/Qwen2.5-7B", ["no/such.json"])
    assert cfg.out_dir == str(tmp_path / "runs")  # absolute: a Worker's current folder may be another
    assert load([TINY, "--critic_model="]).critic_model == ""


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves ~ alone behind =: the run goes to ./~/runs, and ~/m is looked up on the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["--out_dir=~/runs", "--model=~/m", "--critic_model=~/a/b", "--eval_data=~/e.jsonl"]
    cfg = load([config(tmp_path, 'model = "m"\ntrain_data = ["~/t.jsonl"]\n'), *paths])
    found = [cfg.out_dir, cfg.model, cfg.critic_model, *cfg.train_data, *cfg.eval_data]
    assert found == [f"{tmp_path}/{name}" for name in ("runs", "m", "a/b", "t.jsonl", "e.jsonl")]


def test_describe_states_the_arithmetic():
    """The header says 64 x 16 while the run does something else."""
    cfg = load([TINY, "--workers=4", "--tensor_parallel=2", "--prompts_per_step=8", "--samples_per_prompt=3"])
    assert derived(cfg)["responses per step"].endswith("= 24")
    assert derived(cfg)["vLLM engines"].endswith("= 2")
    text = describe(cfg)
    for key, value in vars(cfg).items():
        assert f"{key} = {value!r}" in text.splitlines()


# ---- What is refused -----------------------------------------------------------------------------------------------

REFUSED = {
    "--stepz=3": ["command line", "'stepz'", "did you mean steps?"],
    "--zzzzzz=3": ["command line", "'zzzzzz'", "--help"],
    "--=3": ["command line", "''"],
    "--steps": ["'--steps'", "--key=value"],
    "steps=3": ["'steps=3'", "--key=value"],
    "-steps=3": ["'-steps=3'", "--key=value"],
    "--steps=1e3": ["steps", "whole number", "1000.0"],
    "--steps=1.0": ["steps", "whole number"],
    "--steps=": ["steps", "whole number", "''"],
    "--steps=True": ["steps", "whole number", "True"],
    "--steps=" + "(" * 9000: ["steps", "whole number"],
    "--steps=__import__('os').getpid()": ["steps", "whole number"],
    "--debug=1": ["debug", "True or False"],
    "--dry_run=true": ["dry_run", "True or False", "'true'"],
    "--gamma=None": ["gamma", "a number", "None"],
    "--gamma=high": ["gamma", "a number", "'high'"],
    "--stop=['a', 3]": ["stop", "a list"],
    "--adam_betas=0.9,x": ["adam_betas", "a list", "'x'"],
    "--adam_betas=0.9": ["adam_betas", "len(adam_betas) == 2"],
    "--adam_betas=0.9,1": ["adam_betas=[0.9, 1]", "< 1"],
    "--steps=0": ["steps=0", "steps > 0"],
    "--eval_only=True --steps=1": ["eval_only=True, steps=1", "leave out --steps"],
    "--eval_only=True --eval_data=": ["eval_only=True, eval_data=[]", "name files"],
    "--seed=-1": ["seed=-1", "0 <= seed"],
    "--gamma=1.01": ["gamma=1.01", "0 <= gamma <= 1"],
    "--lam=-0.1": ["lam=-0.1", "0 <= lam <= 1"],
    "--top_p=0": ["top_p=0", "0 < top_p <= 1"],
    "--temperature=0": ["temperature=0", "0.01 <= temperature"],
    "--temperature=0.005": ["temperature=0.005", "0.01 <= temperature"],  # vLLM would sample at 0.01
    "--temperature=1e999": ["temperature=inf", "0.01 <= temperature"],
    "--policy_lr=-1e-6": ["policy_lr=-1e-06", "0 <= policy_lr"],
    "--clip_eps=0": ["clip_eps=0", "0 < clip_eps"],
    "--eval_every=0": ["eval_every=0", "eval_every == -1"],
    "--save_every=-2": ["save_every=-2", "save_every == -1"],
    "--drift_limit=-0.5": ["drift_limit=-0.5", "drift_limit == -1"],
    "--dtype=fp16": ["dtype='fp16'", "bfloat16"],
    "--model=": ["model=''", 'model != ""'],
    "--train_data=": ["train_data=[]", "name at least one file"],
    "--stop=['a', '']": ["stop=['a', '']", "all(stop)"],
    "--name=a/b": ["name='a/b'", '"/" not in name'],
    "--name=..": ["name='..'"],
    "--prompt_template=hello": ["prompt_template='hello'", 'count("{question}") == 1'],
    "--prompt_template={question}{question}": ["prompt_template=", 'count("{question}") == 1'],
    "--workers=0": ["workers=0", "workers > 0"],
    "--max_num_seqs=0": ["max_num_seqs=0", "max_num_seqs > 0"],
    "--max_num_seqs=5000": ["max_num_batched_tokens=4096", "max_num_seqs=5000"],
    "--tensor_parallel=0": ["tensor_parallel=0", "tensor_parallel > 0"],
    "--tensor_parallel=2": ["workers=1", "tensor_parallel=2", "a multiple"],
    "--max_tokens_per_pack=127": [
        "max_tokens_per_pack=127",
        "max_prompt_tokens=32",
        "max_response_tokens=96",
    ],
    "--critic_updates_per_step=1025": [
        "critic_updates_per_step=1025",
        "prompts_per_step=64",
        "samples_per_prompt=16",
    ],
    "--policy_updates_per_step=1025": ["policy_updates_per_step=1025", "prompts_per_step=64"],
    "--top_p=0.9": ["drift_limit", "top_p=0.9"],
    "--advantage=group": ["advantage='group'", "dr_grpo"],
    "--advantage=grpo --samples_per_prompt=1": ["advantage='grpo'", "samples_per_prompt=1"],
    "--advantage=rloo --kl_coef=0.1": ["advantage='rloo'", "kl_coef=0.1", "--kl_coef=0", "--kl_loss_coef"],
    "--advantage=reinforce --critic_warmup_steps=2": ["advantage='reinforce'", "critic_warmup_steps=2"],
    "--advantage=dr_grpo --normalise_advantages=False": ["advantage='dr_grpo'", "normalise_advantages=False"],
    "--drop_equal_groups=True --samples_per_prompt=1": ["drop_equal_groups=True", "samples_per_prompt=1"],
    "--importance_cap=0.5": ["importance_cap=0.5", "importance_cap >= 1"],
    "--importance_token_band=0.5": ["importance_token_band=[0.5]", "len(importance_token_band) == 2"],
    "--importance_token_band=5,0.5": ["importance_token_band=5,0.5", "1 inside"],
    "--importance_response_band=1.1,1.2": ["importance_response_band=1.1,1.2", "1 inside"],
    "--kl_estimator=k4": ["kl_estimator='k4'", "k3"],
    "--loss_average=sequence": ["loss_average='sequence'", "response"],
    "--epochs_per_step=0": ["epochs_per_step=0", "epochs_per_step > 0"],
    "--eval_max_response_tokens=-1": ["eval_max_response_tokens=-1", ">= 0"],
    "--eval_data=a/test.json,b/test.json": [
        "eval_data",
        "b/test.json",
        "no two files may have the same name",
    ],
    "--eval_data=a/overall.json": ["eval_data", "'overall'", "no two files may have the same name"],
}


@pytest.mark.parametrize("argument", REFUSED, ids=lambda argument: argument[:40])
def test_refused_on_the_command_line(argument):
    """A wrong value is taken silently, or its message does not say which setting, which value and what would do."""
    sizes = [
        "--prompts_per_step=64",
        "--samples_per_prompt=16",
        "--max_prompt_tokens=32",
        "--max_response_tokens=96",
    ]
    load([TINY, *sizes])  # else the next line proves nothing
    message = error_of([TINY, *sizes, *re.split(" (?=--)", argument)])
    assert [part for part in REFUSED[argument] if part not in message] == [], message


WITHOUT_EFFECT = {  # settings → the start of what is said about them, and beside it a setting with which they have one
    "--clip_eps=0.3": ("clip_eps=0.3 has no effect: with one policy update", "--policy_updates_per_step=2"),
    "--clip_eps_high=0.28": ("clip_eps_high=0.28 has no effect: with one policy", "--epochs_per_step=2"),
    "--update_ref_every=3": (
        "update_ref_every=3 has no effect: kl_coef and kl_loss_coef are 0",
        "--kl_coef=0.1",
    ),
    "--kl_estimator=k2": ("kl_estimator='k2' has no effect: kl_loss_coef is 0", "--kl_loss_coef=0.1"),
    "--advantage=grpo --lam=0.95": ("lam=0.95 has no effect: only advantage='gae'", "--advantage=gae"),
}


@pytest.mark.parametrize("arguments", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_named(arguments):
    """An ablation of a month compares two runs that are the same, because the ratio is 1 in both."""
    assert without_effect(load([TINY])) == []
    words, other = WITHOUT_EFFECT[arguments]
    (line,) = without_effect(load([TINY, *arguments.split()]))
    assert line.startswith(words)
    assert without_effect(load([TINY, *arguments.split(), other])) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_has_a_setting_without_effect(path):
    """A config sets what changes nothing beside its other settings."""
    assert without_effect(load([str(path)])) == []


BROKEN_FILES = {
    "stepz = 3": ["mine.py", "'stepz'", "did you mean steps?"],
    "steps = '3'": ["mine.py", "steps", "whole number", "'3'"],
    "if True:\n    steps = 3.5": ["mine.py", "steps", "whole number"],
    "temperature = float('nan')": ["temperature=nan"],
    "train_data = 'a.json'": ["mine.py", "train_data", "a list", "'a.json'"],
    "train_data = ('a.json',)": ["mine.py", "train_data", "a list"],
    "steps = (": [":3", "SyntaxError"],
    "steps = 1 / 0": [":3", "ZeroDivisionError"],
    "import no_such_module": [":3", "ModuleNotFoundError", "no_such_module"],
    "from configs.no_such_size import *": [":3", "no_such_size"],
    "raise ValueError('two\\nlines')": [":3", "two lines"],
    "import sys\nsys.exit(0)": [":4", "SystemExit"],
    "for i in range(2):\n    steps = 3": ["'i'"],
    "\x00": ["mine.py"],
}


@pytest.mark.parametrize("text", BROKEN_FILES)
def test_refused_in_a_file(text, tmp_path):
    """A misspelt key in a config file passes silently: the run of a week used the default. Or: a bare traceback."""
    load([config(tmp_path, GOOD)])  # else the next line proves nothing
    message = error_of([config(tmp_path, GOOD + text + "\n")])
    assert [
        part
        for part in ["mine.py" if ":3" in BROKEN_FILES[text] else "", *BROKEN_FILES[text]]
        if part not in message
    ] == [], message


@pytest.mark.parametrize("argv", [[], ["--steps=3"], ["no_such.py"], ["configs"], [f"{TINY}x", "--steps=3"]])
def test_config_file_missing(argv):
    """The first thing that everyone gets wrong ends in an IndexError."""
    assert "config file" in error_of(argv)


def test_help_names_everything(capsys):
    """--help is written by hand and has forgotten half of the settings."""
    with pytest.raises(SystemExit) as stop:
        load([TINY, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key, (comment, _) in documentation().items():
        assert re.search(rf"^{key} = .*{re.escape(comment)}", text, re.MULTILINE)


def test_help_marks_what_may_differ_when_a_run_goes_on(capsys):
    """A setting was renamed and its mark is lost; or a mark stands at a setting that must stay."""
    with pytest.raises(SystemExit):
        load(["--help"])
    text = capsys.readouterr().out
    assert set(MAY_CHANGE + MAY_MOVE) <= set(documentation())
    for key in documentation():
        mark = "(may change) " if key in MAY_CHANGE else "(may move) " if key in MAY_MOVE else ""
        (found,) = re.findall(rf"^{key} = .*?  # (\(may \w+\) )?", text, re.MULTILINE)
        assert found == mark, key


# ---- As a command --------------------------------------------------------------------------------------------------

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "tensorboard", "matplotlib")
REPORT = f"import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"


def python(code):
    command = [sys.executable, "-c", f"{code}; {REPORT}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_small_homes_import_nothing_heavy():
    """A test of a formula, or --help, waits ten seconds for torch and vLLM."""
    out, _ = python("import configs.load, data.load, log")
    assert json.loads(out[-1]) == []
    # The driver plans before a run: with torch it would make a CUDA context, which takes memory from a Worker.
    out, _ = python("from tools import plan; plan.report(plan.load(['configs/orz_7b.py']), 80.0)")
    assert json.loads(out[-1]) == []


def test_bad_settings_end_in_one_line_before_torch(tmp_path):
    """A misspelt setting costs a minute of imports, and its message drowns in a traceback."""
    bad = ["--stepz=3"], ["--steps=0"], [f"--out_dir={tmp_path}", f"--train_data={tmp_path}/missing.jsonl"]
    calls = "; ".join(f"print(launch.main({[TINY, *arguments]}))" for arguments in bad)
    out, errors = python(f"import launch; {calls}")
    assert out[:-1] == ["2"] * len(bad) and json.loads(out[-1]) == []
    assert len(errors) == len(bad) and all(line.startswith("error: ") for line in errors)
    assert list(tmp_path.iterdir()) == []
