"""Export a kept checkpoint of a run as Hugging Face folders: python tools/export.py runs/NAME STEP

In:   runs/NAME/checkpoints/step_STEP.   Out: runs/NAME/policy_step_STEP and critic_step_STEP.
It takes as many workers as the run had, since each of them holds a part. A run exports its last step by itself.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Run as a script, Python looks for modules in tools/ only.

from configs.load import UserError  # noqa: E402
from data.load import chat_template  # noqa: E402
from launch import start_ray  # noqa: E402
from log import Log  # noqa: E402
from workers import StopRequest, WorkerGroup, checkpoints, learned_networks  # noqa: E402


def export(folder, step):
    """Write the networks of a checkpoint as Hugging Face folders into the run's folder.

    Raises UserError where there is no such run or checkpoint, or where the run is at work.
    """
    config = folder / "config.json"
    if not config.exists():
        raise UserError(f"{folder} is no run: it has no config.json")
    cfg = SimpleNamespace(**json.loads(config.read_text()))
    cfg.out_dir, cfg.name = str(folder.parent), folder.name  # The folder may have moved since the run.
    saved = checkpoints(cfg)
    if step not in saved:
        raise UserError(f"{folder} has no checkpoint of step {step}; there are {sorted(saved)}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=cfg.trust_remote_code)
    tokenizer.chat_template = chat_template(tokenizer, cfg.prompt_template)
    log = Log(cfg)  # takes the lock of the run
    workers = WorkerGroup(cfg, log, start_ray(log), StopRequest())
    workers.place()
    workers.start(step)
    workers.export(tokenizer, suffix=f"_step_{step}")
    folders = [f"{folder}/{kind}_step_{step}" for kind in learned_networks(cfg)]
    log.say(f"networks in {' and '.join(folders)}")


def main(argv):
    try:
        if len(argv) != 2 or not argv[1].isdigit():
            raise UserError(__doc__.splitlines()[0])
        folder = Path(argv[0]).resolve()
        # Ray puts the current folder before the project's on a Worker's path: a reward.py there would be imported.
        os.chdir(ROOT)
        export(folder, int(argv[1]))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
