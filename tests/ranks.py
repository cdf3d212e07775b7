"""Run a function on several ranks: fresh processes in one torch.distributed world, as the Workers of a run are.

run_ranks("test_learner", "updates", 2, folder, **arguments) calls test_learner.updates(**arguments) in two processes and
returns what each returned. A rank that raises fails the test with its log; one that hangs is killed at the deadline.
"""

import ctypes
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
}


def settings(**overrides):
    """All settings of configs/base.py, with changes that every test on a tiny model needs, and the test's own."""
    from configs.load import BASE, read_file

    small = {
        "max_prompt_tokens": 64,
        "max_response_tokens": 64,
        "max_tokens_per_pack": 256,
        "warmup_steps": 0,
    }
    values = read_file(BASE) | small | {"gradient_checkpointing": False, "policy_lr": 1e-3, "critic_lr": 1e-3}
    assert overrides.keys() <= values.keys()
    return SimpleNamespace(**values | overrides)


# The variables that keep ranks off a GPU.
ON_CPU = {"DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND"}


def run_ranks(module, function, world_size, folder, deadline=300, on_gpu=False, **arguments):
    """What `function` returned on each rank. `deadline`, in seconds, only guards against hanging: ten times the expected."""
    environment = {key: value for key, value in ENVIRONMENT.items() if not (on_gpu and key in ON_CPU)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(folder) / f"{function}_{world_size}"
    folder.mkdir()
    (folder / "call.pkl").write_bytes(pickle.dumps((module, function, arguments)))
    processes = []
    for rank in range(world_size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        with open(folder / f"{rank}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, str(folder), str(rank)],
                env=os.environ | environment | {name: str(value) for name, value in places.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
        processes.append(process)
    try:
        end = time.monotonic() + deadline
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join(
        f"---- rank {rank}, exit code {code} (None: still running) ----\n"
        + "\n".join((folder / f"{rank}.log").read_text().splitlines()[-60:])
        for rank, code in enumerate(codes)
    )
    assert codes == [0] * world_size, f"{module}.{function} on {world_size} ranks:\n{logs}"
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(world_size)]


def main(folder, rank):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives a killed test run
    import deepspeed.ops
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as the Worker does
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    module, function, arguments = pickle.loads((folder / "call.pkl").read_bytes())
    result = getattr(importlib.import_module(module), function)(**arguments)
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    torch.distributed.barrier()
    os._exit(0)  # vLLM and gloo have threads that outlive main


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
