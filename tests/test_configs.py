"""Settings: everything in base.py is documented, enforced and used, and every mistake gives one clear line."""

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
OTHERS = ("__init__", "base", "load", "eval_only")  # files that are no complete configs
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
    """Fails if a formatter wraps a long line of base.py, so that the comment with its rule is no longer found."""
    base, words = read_file(BASE), documentation()
    assert list(base) == list(words)
    for key, value in base.items():
        comment, legal = words[key]
        assert comment
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert re.search(r"\bx\b", legal), f"{key} is a number, but nothing says which are legal"


@pytest.mark.parametrize("key", read_file(BASE))
def test_every_setting_is_read(key):
    """Fails if no file reads a setting: the user would change something that has no effect."""
    text = "\n".join((ROOT / source).read_text() for source in SOURCES)
    assert re.search(rf'cfg\.{key}\b|"{key}"', text)


def test_recipe_is_orz():
    """Fails if a default drifts away from the paper's while someone tunes the demo."""
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
    """Fails if a setting is renamed in base.py while a config that nobody has run still has the old name."""
    cfg = load([str(path)])
    assert cfg.name == path.stem
    assert set(vars(cfg)) == set(read_file(BASE))
    assert all(Path(file).is_file() for file in cfg.train_data + cfg.eval_data if "tiny" in file)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_evaluates_alone(path):
    """Fails if --eval_only=True changes only the name, so that the run trains, or if a config's own settings override
    it."""
    cfg = load([str(path), "--eval_only=True", "--eval_data=a.jsonl"])
    assert (cfg.name, cfg.steps, cfg.train_data, cfg.kl_coef) == (f"{path.stem}_eval_only", 0, [], 0)


# ---- What is accepted ----------------------------------------------------------------------------------------------


def test_command_line_comes_last_and_values_keep_their_type(tmp_path):
    """Fails if --steps=3 becomes "3", if a stop string with = in it, or a quoted one with a comma, is cut, or if 1 is
    refused where 1.0 is meant."""
    path = config(tmp_path, GOOD + "steps = 5\ntemperature = 1\n")
    more = ["--steps=7", "--steps=9", "--stop=a=b,c", "--gamma=1", "--policy_lr=2e-5", "--debug=False"]
    cfg = load([path, *more, "--name=1", "--adam_betas=0,0.9", "--eval_data=", "--drift_limit=-1"])
    assert (cfg.steps, cfg.stop, cfg.gamma, cfg.policy_lr, cfg.debug) == (9, ["a=b", "c"], 1, 2e-5, False)
    assert (cfg.name, cfg.adam_betas, cfg.eval_data, cfg.temperature) == ("1", [0, 0.9], [], 1)
    assert load([path, "--stop=['a,b', 'c']"]).stop == ["a,b", "c"]
    assert load([path, "--stop=[]"]).stop == []


def test_config_may_start_from_another(tmp_path):
    """Fails if modules, functions or classes that a config uses are taken for settings, or if an import hides a
    setting."""
    text = "import math\nfrom pathlib import Path\nfrom configs.tiny import *\n_half = 2\ndef double(x): return 2 * x\n"
    cfg = load([config(tmp_path, text + "steps = double(_half) + int(math.sqrt(9))\n")])
    assert cfg.steps == 7 and cfg.name == "mine"
    assert cfg.prompts_per_step == read_file(TINY)["prompts_per_step"]


def test_paths(tmp_path, monkeypatch):
    """Fails if a run that is started in another folder does not find the demo's model, or if its paths stay relative.
    A path that exists in the current folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert load([TINY]).model == str(ROOT / "data/tiny")
    (tmp_path / "data/tiny").mkdir(parents=True)
    cfg = load([TINY, "--critic_model=Qwen/Qwen2.5-7B", "--eval_data=no/such.json"])
    assert cfg.model == str(tmp_path / "data/tiny")  # the current folder comes first
    assert (cfg.critic_model, cfg.eval_data) == ("Qwen/Qwen2.5-7B", ["no/such.json"])
    assert cfg.out_dir == str(tmp_path / "runs")  # absolute: a Worker's current folder may be another
    assert load([TINY, "--critic_model="]).critic_model == ""


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """A shell does not expand ~ after =. Fails if the run is written to ./~/runs, or if ~/m is looked up on the
    hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["--out_dir=~/runs", "--model=~/m", "--critic_model=~/a/b", "--eval_data=~/e.jsonl"]
    cfg = load([config(tmp_path, 'model = "m"\ntrain_data = ["~/t.jsonl"]\n'), *paths])
    found = [cfg.out_dir, cfg.model, cfg.critic_model, *cfg.train_data, *cfg.eval_data]
    assert found == [f"{tmp_path}/{name}" for name in ("runs", "m", "a/b", "t.jsonl", "e.jsonl")]


def test_describe_states_the_arithmetic():
    """Fails if the header shows other numbers than those that the run uses."""
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
    """Fails if a wrong value is accepted, or if its message does not say which setting and value are wrong and what
    would do."""
    sizes = [
        "--prompts_per_step=64",
        "--samples_per_prompt=16",
        "--max_prompt_tokens=32",
        "--max_response_tokens=96",
    ]
    load([TINY, *sizes])  # accepted without the argument; otherwise the refusal would prove nothing
    message = error_of([TINY, *sizes, *re.split(" (?=--)", argument)])
    assert [part for part in REFUSED[argument] if part not in message] == [], message


WITHOUT_EFFECT = {  # settings → the start of the message about them, and a further setting with which they have an effect
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
    """Fails if nobody is told that a setting has no effect: a long ablation would compare two runs that are the
    same."""
    assert without_effect(load([TINY])) == []
    words, other = WITHOUT_EFFECT[arguments]
    (line,) = without_effect(load([TINY, *arguments.split()]))
    assert line.startswith(words)
    assert without_effect(load([TINY, *arguments.split(), other])) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_has_a_setting_without_effect(path):
    """Fails if a config sets what has no effect beside its other settings."""
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
    """Fails if a misspelt key in a config file is ignored, so that a long run uses the default, or if an error is a
    bare traceback."""
    load([config(tmp_path, GOOD)])  # accepted without the text; otherwise the refusal would prove nothing
    message = error_of([config(tmp_path, GOOD + text + "\n")])
    assert [
        part
        for part in ["mine.py" if ":3" in BROKEN_FILES[text] else "", *BROKEN_FILES[text]]
        if part not in message
    ] == [], message


@pytest.mark.parametrize("argv", [[], ["--steps=3"], ["no_such.py"], ["configs"], [f"{TINY}x", "--steps=3"]])
def test_config_file_missing(argv):
    """Fails if a forgotten config file, the most common mistake, ends in an IndexError."""
    assert "config file" in error_of(argv)


def test_help_names_everything(capsys):
    """Fails if --help does not show every setting with its comment."""
    with pytest.raises(SystemExit) as stop:
        load([TINY, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key, (comment, _) in documentation().items():
        assert re.search(rf"^{key} = .*{re.escape(comment)}", text, re.MULTILINE)


def test_help_marks_what_may_differ_when_a_run_goes_on(capsys):
    """Fails if a renamed setting loses its mark, or if a setting that must stay has one."""
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
    """Fails if --help, or a test of a formula, must wait ten seconds for torch and vLLM."""
    out, _ = python("import configs.load, data.load, log")
    assert json.loads(out[-1]) == []
    # The driver plans before a run: with torch it would make a CUDA context, which takes memory from a Worker.
    out, _ = python("from tools import plan; plan.report(plan.load(['configs/orz_7b.py']), 80.0)")
    assert json.loads(out[-1]) == []


def test_bad_settings_end_in_one_line_before_torch(tmp_path):
    """Fails if a misspelt setting costs a minute of imports, or if its message is lost in a traceback."""
    bad = ["--stepz=3"], ["--steps=0"], [f"--out_dir={tmp_path}", f"--train_data={tmp_path}/missing.jsonl"]
    calls = "; ".join(f"print(launch.main({[TINY, *arguments]}))" for arguments in bad)
    out, errors = python(f"import launch; {calls}")
    assert out[:-1] == ["2"] * len(bad) and json.loads(out[-1]) == []
    assert len(errors) == len(bad) and all(line.startswith("error: ") for line in errors)
    assert list(tmp_path.iterdir()) == []
