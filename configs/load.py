"""Settings: read base.py, then the config file, then the command line; strictly, and before anything heavy is imported.

In:   ["configs/tiny.py", "--steps=3", …].   Out: a namespace with every setting of base.py.
Whatever is wrong raises UserError: one line that says what, where, and what to do.
"""

import ast
import difflib
import os
import re
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base.py"
MODES = ("debug", "eval_only")  # each is a file beside base.py, which is read after the config
PATHS = ("model", "critic_model", "train_data", "eval_data", "task")
# Settings that may differ when a run goes on: how long, how fast, how often.
MAY_CHANGE = """steps policy_lr critic_lr policy_lr_final lr_decay_steps eval_every eval_samples eval_data save_every
    keep_checkpoints samples_every report_samples max_restarts on_nonfinite drift_limit phase_timeout gpu_memory gpu_memory_utilization
    trust_remote_code task_memory_gb wandb""".split()
# Paths and names that may differ then: what they name may have moved, and its content is compared. All others must stay.
MAY_MOVE = "model critic_model train_data task out_dir name".split()
TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", list: "a list"}


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is printed; exit code 2."""


def load(argv):
    """The settings of a run. With --help in argv, prints the help and exits."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError("the config file comes first: python launch.py CONFIG --key=value …, or --help")
    base = read_file(BASE)
    settings = dict(base)
    paths = [argv[0]]
    for mode in MODES:
        if f"--{mode}=True" in argv:
            paths.append(ROOT / "configs" / f"{mode}.py")
    for path in paths:
        for key, value in read_file(path).items():
            settings[key] = checked(key, value, base, path)
    for argument in argv[1:]:
        key, text = split_argument(argument)
        value = parse(text, base.get(key))
        settings[key] = checked(key, value, base, "command line")
    if not settings["name"]:
        modes = [mode for mode in MODES if settings[mode]]
        settings["name"] = "_".join([Path(argv[0]).stem, *modes])
    check_ranges(settings)
    for key in PATHS:
        settings[key] = find(settings[key])
    # Workers may be started in another folder.
    settings["out_dir"] = os.path.abspath(os.path.expanduser(settings["out_dir"]))
    cfg = SimpleNamespace(**settings)
    check_steps_and_data(cfg)
    check_sizes(cfg)
    check_algorithm(cfg)
    return cfg


HELP = """usage: python launch.py CONFIG [--key=value …]

A run that goes on (the same command once more, after an interruption or with more steps) keeps its settings, but
  (may change)  marks settings that may then have other values;
  (may move)    marks paths and names: they may differ, as long as what they name is the same.
With another value of any other setting the command is refused: give that run another --name.

"""


def help_text():
    """The usage, and base.py with these marks at the beginning of its comments."""
    text = BASE.read_text(encoding="utf-8")
    for mark, keys in (("may change", MAY_CHANGE), ("may move", MAY_MOVE)):
        for key in keys:
            text = re.sub(rf"^({key} = .*?  # )", rf"\1({mark}) ", text, flags=re.MULTILINE)
    return HELP + text


# ---- Reading ---------------------------------------------------------------------------------------------------


def read_file(path):
    """What a config file assigns: its names without underscore that are no modules, functions or classes."""
    if not os.path.isfile(path):
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # A config is a program: anything can go wrong in it.
        place = f"{path}:{failing_line(error, path)}"
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: {type(error).__name__}: {reason}") from None
    settings = {}
    for name, value in names.items():
        is_code = callable(value) or isinstance(value, ModuleType)
        if not is_code and not name.startswith("_"):
            settings[name] = value
    return settings


def failing_line(error, path):
    """The number of the last line of the file `path` that ran before the error, or that Python could not parse."""
    line = getattr(error, "lineno", 1)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno
    return line


def split_argument(argument):
    """`--key=value` as (key, value). The value may hold more equals signs."""
    key, equals, text = argument.partition("=")
    if not key.startswith("--") or not equals:
        raise UserError(f"command line: {argument!r} is not of the form --key=value")
    return key.removeprefix("--"), text


def parse(text, default):
    """A value on the command line. Texts need no quotes; a list is a Python list, or its items between commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, list) and not text.startswith("["):
        example = item_example(default)
        return [parse(item, example) for item in text.split(",") if item]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # `checked` refuses it, because it has the wrong type.


def find(path):
    """The absolute path, if it exists from the current folder or else from the project's folder; else the path as it is,
    which may be a hub name. For a list, a list.

    "~" is the home folder; a shell does not replace it behind an equals sign.
    """
    if isinstance(path, list):
        return [find(item) for item in path]
    path = os.path.expanduser(path)
    for place in (os.path.abspath(path), str(ROOT / path)):
        if path and os.path.exists(place):
            return place
    return path


# ---- Types and ranges --------------------------------------------------------------------------------------------


def checked(key, value, base, place):
    """The value, if there is such a setting and the value has the type of its default."""
    if key not in base:
        near = difflib.get_close_matches(key, base, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise UserError(f"{place}: there is no setting {key!r}; {hint}")
    if not has_type_of(base[key], value):
        comment, _ = documentation()[key]
        expected = TYPES[type(base[key])]
        raise UserError(f"{place}: {key} must be {expected}, not {value!r} ({comment})")
    return value


def has_type_of(default, value):
    """Whether a value has its default's type. An int is accepted where a float is meant."""
    if isinstance(default, list):
        example = item_example(default)
        return isinstance(value, list) and all(has_type_of(example, item) for item in value)
    if type(default) is float:
        return type(value) in (int, float)
    return type(value) is type(default)


def item_example(default):
    """An example item for a setting with this list as its default. Where the default is empty, items are texts."""
    return default[0] if default else ""


def documentation():
    """base.py's comments: setting → (comment, the range in its brackets or an empty text)."""
    pattern = r"^([a-z]\w*) = .*?  # (.*?)(?: \[([^][]+)\])?$"
    found = re.findall(pattern, BASE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key: (comment, legal) for key, comment, legal in found}


def check_ranges(settings):
    """Raises UserError unless every setting is in the range that base.py gives in brackets."""
    for key, (comment, legal) in documentation().items():
        if legal and not eval(legal, {"x": settings[key]}):
            rule = re.sub(r"\bx\b", key, legal)
            raise UserError(f"{key}={settings[key]!r}: it must be that {rule} ({comment})")


# ---- What follows from the settings, for more than one file ------------------------------------------------------


def has_critic(cfg):
    """Whether the advantages need a critic: only those of "gae" do."""
    return cfg.advantage == "gae"


def has_reference(cfg):
    """Whether a reference model is loaded, to which the policy is held by a KL term."""
    return not cfg.eval_only and (cfg.kl_coef > 0 or cfg.kl_loss_coef > 0)


def updates_per_step(cfg, kind):
    """How many updates a learner, "policy" or "critic", makes in a step."""
    per_epoch = cfg.policy_updates_per_step if kind == "policy" else cfg.critic_updates_per_step
    return per_epoch * cfg.epochs_per_step


def eval_response_tokens(cfg):
    """The most tokens of a response in evaluation."""
    return cfg.eval_max_response_tokens or cfg.max_response_tokens


def context_tokens(cfg):
    """The longest sequence that vLLM samples, with its prompt, in training or in evaluation."""
    return cfg.max_prompt_tokens + max(cfg.max_response_tokens, eval_response_tokens(cfg))


# ---- Settings that bind each other -------------------------------------------------------------------------------


def check_steps_and_data(cfg):
    """Raises UserError where the length of the run, its data and eval_only do not go together."""
    if cfg.eval_only and cfg.steps > 0:
        raise UserError(f"eval_only=True, steps={cfg.steps}: eval_only trains nothing, so leave out --steps")
    if not cfg.eval_only and cfg.steps == 0:
        raise UserError("steps=0 trains nothing: it must be that steps > 0, or give --eval_only=True")
    if cfg.task and not os.path.isfile(cfg.task):
        raise UserError(f"task={cfg.task!r}: there is no such file")
    if not cfg.task:
        check_has_questions(cfg)
    names = ["overall"]  # The metrics have the mean over all files under this name.
    for path in cfg.eval_data:
        name = Path(path).stem
        if name in names:
            reason = "metrics are named after the file, so no two files may have the same name"
            raise UserError(f"eval_data: {path} would be the second set that is called {name!r}; {reason}")
        names.append(name)


def check_has_questions(cfg):
    """Raises UserError where there is nothing to train on, or to measure. A task file may have questions of its own."""
    if cfg.eval_only and not cfg.eval_data:
        raise UserError(
            "eval_only=True, eval_data=[]: there is nothing to measure on, so name files in eval_data"
        )
    if not cfg.eval_only and not cfg.train_data:
        raise UserError("train_data=[]: there is nothing to train on, so name at least one file")


def check_sizes(cfg):
    """Raises UserError where one setting is too large or too small for what another one needs."""
    if cfg.workers % cfg.tensor_parallel:
        values = f"workers={cfg.workers}, tensor_parallel={cfg.tensor_parallel}"
        raise UserError(
            f"{values}: each vLLM engine takes {cfg.tensor_parallel} workers; give a multiple of it"
        )
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if cfg.max_tokens_per_pack < longest:
        lengths = f"max_prompt_tokens={cfg.max_prompt_tokens} + max_response_tokens={cfg.max_response_tokens}"
        reason = f"a pack holds whole sequences, of up to {lengths} = {longest}; give at least that"
        raise UserError(f"max_tokens_per_pack={cfg.max_tokens_per_pack}: {reason}")
    if cfg.max_num_batched_tokens < cfg.max_num_seqs:
        reason = f"each of max_num_seqs={cfg.max_num_seqs} responses adds a token to a forward pass"
        raise UserError(f"max_num_batched_tokens={cfg.max_num_batched_tokens}: {reason}; give at least that")


def check_algorithm(cfg):
    """Raises UserError where PPO's settings contradict each other."""
    responses = cfg.prompts_per_step * cfg.samples_per_prompt
    batch = f"prompts_per_step={cfg.prompts_per_step} x samples_per_prompt={cfg.samples_per_prompt}"
    updates = {"policy_updates_per_step": cfg.policy_updates_per_step}
    if has_critic(cfg):
        updates["critic_updates_per_step"] = cfg.critic_updates_per_step
    for key, count in updates.items():
        if count > responses:
            raise UserError(f"{key}={count}: it may be {batch} = {responses} at most, one response an update")
    if not has_critic(cfg):
        check_without_critic(cfg)
    for key in ("importance_token_band", "importance_response_band"):
        low, high = getattr(cfg, key)
        if high and not 0 <= low < 1 < high:
            raise UserError(f"{key}={low},{high}: a band of ratios must have 1 inside; 0,0 switches it off")
    if cfg.drop_equal_groups and cfg.samples_per_prompt == 1:
        reason = "a single response is always equal to itself, so nothing would be left to train on"
        raise UserError(f"drop_equal_groups=True, samples_per_prompt=1: {reason}")
    if cfg.top_p < 1 and cfg.drift_limit != -1:
        reason = "vLLM samples from a cut distribution, so its log-probs differ from the policy's"
        raise UserError(f"top_p={cfg.top_p}, drift_limit={cfg.drift_limit}: {reason}; give --drift_limit=-1")


def check_without_critic(cfg):
    """Raises UserError where advantages that compare the responses to a question meet a setting of the critic's."""
    advantage = f"advantage={cfg.advantage!r}"
    if cfg.samples_per_prompt == 1:
        reason = "it compares the responses to a question, so it needs at least 2"
        raise UserError(f"{advantage}, samples_per_prompt=1: {reason}")
    if cfg.kl_coef > 0:
        reason = "the penalty is part of the rewards per token, which only advantage='gae' uses"
        raise UserError(f"{advantage}, kl_coef={cfg.kl_coef}: {reason}; give --kl_coef=0, or --kl_loss_coef")
    if cfg.critic_warmup_steps > 0:
        reason = "there is no critic that could learn alone"
        raise UserError(f"{advantage}, critic_warmup_steps={cfg.critic_warmup_steps}: {reason}; give 0")
    if not cfg.normalise_advantages:
        reason = "only gae has this choice; grpo and reinforce always normalise, dr_grpo and rloo never do"
        raise UserError(f"{advantage}, normalise_advantages=False: {reason}")


def without_effect(cfg):
    """Lines to print: one for each setting that differs from base.py but has no effect with the other settings."""
    unused = {}  # setting → why
    if updates_per_step(cfg, "policy") == 1:
        for key in ("clip_eps", "clip_eps_high"):
            unused[key] = "with one policy update a step the ratio is always 1"
    if not has_reference(cfg):
        unused["update_ref_every"] = "kl_coef and kl_loss_coef are 0"
    if cfg.kl_loss_coef == 0:
        unused["kl_estimator"] = "kl_loss_coef is 0"
    if not has_critic(cfg):
        for key in ("gamma", "lam", "critic_lam", "value_clip"):
            unused[key] = "only advantage='gae' uses it"
    base = read_file(BASE)
    lines = []
    for key, reason in unused.items():
        value = getattr(cfg, key)
        if value != base[key]:
            lines.append(f"{key}={value!r} has no effect: {reason}")
    return lines
