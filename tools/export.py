"""Export a kept checkpoint of a run as Hugging Face folders: python tools/export.py runs/NAME STEP [--model=FOLDER]

In:   runs/NAME/checkpoints/step_STEP.   Out: runs/NAME/policy_step_STEP and critic_step_STEP.
It needs as many workers as the run had, since each of them loads a part. A run exports its last step by itself.
If the folder of the model from which the run started has moved, --model (or --critic_model) says where it is now.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # For a script in tools/, Python looks for modules there only.

from configs.load import UserError, find  # noqa: E402
from data.content import model_content  # noqa: E402
from data.load import chat_template  # noqa: E402
from data.models import local_model, read_tokenizer  # noqa: E402
from launch import start_ray  # noqa: E402
from log import Log  # noqa: E402
from workers import StopRequest, WorkerGroup, checkpoints, learned_networks  # noqa: E402

USAGE = __doc__.splitlines()[0]


def export(folder, step, moved):
    """Write the networks of a checkpoint as Hugging Face folders into the run's folder.

    moved: "model" or "critic_model" → the folder where that model is now. Raises UserError where there is no such run,
    checkpoint or model, or where the run is still at work.
    """
    config = folder / "config.json"
    if not config.exists():
        raise UserError(f"{folder} is no run: it has no config.json")
    cfg = SimpleNamespace(**json.loads(config.read_text()))
    cfg.out_dir, cfg.name = str(folder.parent), folder.name  # The folder may have moved since the run.
    saved = checkpoints(cfg)
    if step not in saved:
        raise UserError(f"{folder} has no checkpoint of step {step}; there are {sorted(saved)}")
    find_models(cfg, moved)
    tokenizer = read_tokenizer(cfg.model, f"model={cfg.model!r}", cfg.trust_remote_code)
    tokenizer.chat_template = chat_template(tokenizer, cfg.prompt_template)
    log = Log(cfg)  # This takes the run's lock, and refuses a model with other content than the run's.
    workers = WorkerGroup(cfg, log, start_ray(log), StopRequest())
    workers.place()
    workers.start(step)
    workers.export(tokenizer, suffix=f"_step_{step}")
    folders = [f"{folder}/{kind}_step_{step}" for kind in learned_networks(cfg)]
    log.say(f"networks in {' and '.join(folders)}")


def find_models(cfg, moved):
    """Set the models of the run to where they are now, and their hashes. Raises UserError where one is gone."""
    if cfg.critic_model == cfg.model:  # the default: both have moved together
        moved.setdefault("critic_model", moved.get("model", cfg.model))
    for setting in ("model", "critic_model"):
        path = find(moved.get(setting, getattr(cfg, setting)))
        if setting not in moved and not os.path.isdir(path):
            raise UserError(
                f"{setting}={path!r}, from which the run started, is gone: --{setting}=FOLDER says where it is"
            )
        setattr(cfg, setting, local_model(path, setting))
    models = {"model": model_content(cfg.model), "critic_model": model_content(cfg.critic_model)}
    cfg.content = getattr(cfg, "content", {}) | models


def read_arguments(argv):
    """(the run's folder, the step, {setting: path} of models that have moved)."""
    moved = {}
    for argument in argv[2:]:
        key, _, path = argument.partition("=")
        if key not in ("--model", "--critic_model") or not path:
            raise UserError(USAGE)
        moved[key.removeprefix("--")] = path
    if len(argv) < 2 or not argv[1].isdigit():
        raise UserError(USAGE)
    return Path(argv[0]).resolve(), int(argv[1]), moved


def main(argv):
    try:
        export(*read_arguments(argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
