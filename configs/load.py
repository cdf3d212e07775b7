"""Settings: read base.py, then the config file, then the command line; strictly, and before anything heavy is imported.

In:   ["configs/tiny.py", "--steps=3", …].   Out: a namespace with every setting of base.py.
Whatever is wrong raises UserError: one line that says what, where, and what to do.
"""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "base.py"


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is printed; exit code 2."""


def load(argv):
    """The settings of a run. Prints the help and exits where it is asked for."""
    defaults = read_file(BASE)
    if not argv or "--help" in argv or "-h" in argv:
        print(help_text(defaults))
        sys.exit(0 if argv else 2)
    config, overrides = argv[0], argv[1:]
    if config.startswith("-"):
        raise UserError(f"the config file comes first: python launch.py configs/tiny.py {config}")
    settings = dict(defaults)
    for key, value in read_file(config).items():
        settings[key] = checked(key, value, defaults, config)
    for argument in overrides:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"command line: {argument!r} is not of the form --key=value")
        check_known(key, defaults, "command line")
        settings[key] = checked(key, parsed(text, defaults[key]), defaults, "command line")
    settings["name"] = settings["name"] or Path(config).stem
    cfg = SimpleNamespace(**settings)
    check_rules(cfg)
    cfg.model, cfg.critic_model = existing(cfg.model), existing(cfg.critic_model)
    cfg.train_data, cfg.eval_data = (
        [existing(p) for p in cfg.train_data],
        [existing(p) for p in cfg.eval_data],
    )
    return cfg


def read_file(path):
    """The settings that a config file assigns: names without underscore that are no modules, functions or classes."""
    if not os.path.isfile(path):
        raise UserError(f"config file {str(path)!r} does not exist")
    sys.path.insert(0, str(ROOT))  # a config may start with `from configs.orz_7b import *`
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else last_line(error, str(path))
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    skipped = (ModuleType, type, type(load))
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, skipped)}


def last_line(error, path):
    """The line of `path` in which an exception was raised."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def check_known(key, defaults, place):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        raise UserError(f"{place}: there is no setting {key!r}; {hint}")


def parsed(text, default):
    """A command-line value as Python, by the type of the setting's default."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, list) and not isinstance(value, list):
        return text.split(",")
    return value


def checked(key, value, defaults, place):
    """The value, if its type is that of the default: an int is a fine float, nothing else is converted."""
    check_known(key, defaults, place)
    kind = type(defaults[key])
    if kind is float and type(value) is int:
        value = float(value)
    if kind is list and type(value) is tuple:
        value = list(value)
    if type(value) is not kind:
        raise UserError(
            f"{place}: {key} must be {kind.__name__}, as in {key}={defaults[key]!r}, not {value!r}"
        )
    element = {"adam_betas": (float, int)}.get(key, str)
    if kind is list and not all(isinstance(item, element) for item in value):
        raise UserError(f"{place}: {key} must be a list as in {key}={defaults[key]!r}, not {value!r}")
    return value


def check_rules(cfg):
    """What no single type says: ranges, and what settings demand of each other."""
    over_0 = "steps workers tensor_parallel prompts_per_step samples_per_prompt max_prompt_tokens max_response_tokens"
    over_0 += " max_tokens_per_pack policy_updates_per_step critic_updates_per_step eval_samples temperature"
    over_0 += " eval_temperature max_grad_norm clip_eps value_clip top_p eval_top_p gpu_memory_utilization"
    not_negative = "policy_lr critic_lr kl_coef warmup_steps grader_processes phase_timeout seed gamma lam"
    at_most_1 = "gamma lam top_p eval_top_p gpu_memory_utilization"
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    responses = cfg.prompts_per_step * cfg.samples_per_prompt
    rules = [(getattr(cfg, key) > 0, f"{key} must be over 0") for key in over_0.split()]
    rules += [(getattr(cfg, key) >= 0, f"{key} must not be negative") for key in not_negative.split()]
    rules += [(getattr(cfg, key) <= 1, f"{key} must be at most 1") for key in at_most_1.split()]
    for key in ("eval_every", "save_every"):
        rules.append(
            (getattr(cfg, key) > 0 or getattr(cfg, key) == -1, f"{key} must be over 0, or -1 for off")
        )
    for key in ("model", "train_data"):
        rules.append((getattr(cfg, key), f"{key} is not set, and has no default"))
    for key in ("policy_updates_per_step", "critic_updates_per_step"):
        rules.append((getattr(cfg, key) <= responses, f"{key} is more than the step's {responses} responses"))
    rules += [
        (cfg.dtype in ("auto", "float32", "bfloat16"), "dtype must be auto, float32 or bfloat16"),
        (len(cfg.adam_betas) == 2, "adam_betas must be two numbers"),
        (all(0 <= beta < 1 for beta in cfg.adam_betas), "adam_betas must lie between 0 and 1"),
        (
            cfg.workers % max(1, cfg.tensor_parallel) == 0,
            f"workers={cfg.workers} must be a multiple of tensor_parallel={cfg.tensor_parallel}",
        ),
        (
            longest <= cfg.max_tokens_per_pack,
            f"max_tokens_per_pack={cfg.max_tokens_per_pack} must hold the longest sequence: raise it to "
            f"max_prompt_tokens + max_response_tokens = {longest}",
        ),
        (
            cfg.prompt_template == "chat" or cfg.prompt_template.count("{question}") == 1,
            'prompt_template must contain {question} exactly once, or be "chat"',
        ),
        (all(cfg.stop), "stop must not hold an empty string: it would end every response at once"),
        (
            cfg.top_p == 1 or cfg.drift_limit < 0,
            "top_p below 1 needs drift_limit=-1: vLLM and learner then differ",
        ),
        (Path(cfg.name).name == cfg.name, f"name must be a plain folder name, not {cfg.name!r}"),
    ]
    for holds, message in rules:
        if not holds:
            key = message.split()[0]
            raise UserError(f"{message} (it is {getattr(cfg, key)!r})" if hasattr(cfg, key) else message)


def existing(path):
    """A relative path is looked up here first, then in the project's folder; a hub name stays as it is."""
    return str(ROOT / path) if path and not os.path.exists(path) and os.path.exists(ROOT / path) else path


def derived(cfg):
    """The numbers that follow from the settings."""
    responses, engines = cfg.prompts_per_step * cfg.samples_per_prompt, cfg.workers // cfg.tensor_parallel
    return {
        "responses per step": f"{cfg.prompts_per_step} prompts x {cfg.samples_per_prompt} samples = {responses:,}",
        "response tokens per step": f"at most {responses * cfg.max_response_tokens:,}",
        "vLLM engines": f"{cfg.workers} workers / tensor parallel {cfg.tensor_parallel} = {engines}",
        "responses per critic update": f"{responses // cfg.critic_updates_per_step:,}",
        "responses per policy update": f"{responses // cfg.policy_updates_per_step:,}",
    }


def describe(cfg):
    """Every setting as it stands, and the numbers that follow."""
    settings = [f"{key} = {value!r}" for key, value in vars(cfg).items()]
    return "\n".join(settings + [""] + [f"{name}: {value}" for name, value in derived(cfg).items()])


def help_text(defaults):
    """Every setting with its default and comment, in the order and groups of base.py."""
    lines = ["usage: python launch.py CONFIG [--key=value …]", ""]
    for line in BASE.read_text().splitlines():
        key = line.partition(" = ")[0]
        if line.startswith("# ----"):
            lines += ["", line.strip("# -")]
        elif key in defaults:
            default = repr(defaults[key])
            default = default if len(default) < 60 else default[:57] + "..."
            lines.append(f"  --{key}={default}\n        {line.partition('  # ')[2]}")
    return "\n".join(lines)
