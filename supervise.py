"""Run launch.py, and again after the death of a machine, a process or a phase that hung: python supervise.py CONFIG …

In:   launch.py's own arguments.   Out: launch.py's exit code.
A run goes on from its newest checkpoint by the same command, and this gives that command again: after exit code 75 (a
Worker died or was over phase_timeout) and after a driver that was killed. Never after an error of the run's own (it
would come back), nor twice without a new checkpoint in between, nor more than MOST times.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from configs.load import UserError, load
from launch import TRY_AGAIN, checkpoints

MOST = 100


def main(argv):
    try:
        cfg = load(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command, folder, failed_at = (
        [sys.executable, "-u", str(Path(__file__).with_name("launch.py")), *argv],
        None,
        [],
    )
    folder = Path(cfg.out_dir) / cfg.name
    for signum in (signal.SIGINT, signal.SIGTERM):  # launch.py's to handle: it ends, and so does this
        signal.signal(signum, lambda signum, _: process.send_signal(signum))
    while True:
        process = subprocess.Popen(command)
        code = process.wait()
        step = max(checkpoints(folder), default=0)
        if code not in (TRY_AGAIN, -signal.SIGKILL) or step in failed_at or len(failed_at) == MOST:
            return code if code >= 0 else 128 - code
        failed_at.append(step)
        print(f"restart {len(failed_at)}: exit code {code}, from the checkpoint of step {step}", flush=True)
        time.sleep(5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
