"""What a machine with NVIDIA GPUs needs beside Python packages: python tools/gpu_machine.py says what is missing.

`make demo` runs this before it installs gigabytes of packages, and each Worker on a GPU calls check_worker before it builds
networks. As a script it therefore imports only Python's standard library.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST_DRIVER = 580  # for CUDA 13, which torch 2.13 is built with


def driver_version():
    """The version of the NVIDIA driver, such as "580.65.06"; "" where nvidia-smi does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def old_driver(version):
    """What to do about a driver that is too old for the pinned torch; None where it is new enough."""
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) >= OLDEST_DRIVER:
        return None
    return f"torch 2.13 needs the NVIDIA driver {OLDEST_DRIVER} or newer, not {version or 'none'}: install it"


def missing_tools(environment=os.environ, include=sysconfig.get_path("include")):
    """What Triton needs, in order to compile a launcher for its kernels, and does not find here; one text each."""
    missing = []
    path = environment.get("PATH")
    compilers = [environment["CC"]] if environment.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(compiler, path=path) for compiler in compilers):
        missing.append(
            f"no C compiler ({' or '.join(compilers)}): apt-get install build-essential, or set CC"
        )
    if not Path(include, "Python.h").is_file():
        missing.append(
            f"no {include}/Python.h: apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        )
    return missing


def unseen_gpu(torch_version, cuda_version, driver):
    """Why a torch of this version may see no GPU, and what to do. cuda_version is None for a build without CUDA."""
    if cuda_version is None:
        return f"torch {torch_version} is a build without CUDA and sees no GPU: install requirements.txt"
    advice = (
        old_driver(driver)
        or f"the NVIDIA driver is {driver}: try python -c 'import torch; torch.cuda.init()'"
    )
    return f"torch {torch_version} sees no GPU; {advice}"


def check_worker(node):
    """Raise RuntimeError, naming this node, unless a Worker to which Ray has given a GPU can compute with it here."""
    import torch

    missing = missing_tools()
    if not torch.cuda.is_available():
        missing.insert(0, unseen_gpu(torch.__version__, torch.version.cuda, driver_version()))
    if missing:
        raise RuntimeError(f"node {node} cannot use its GPU: {'; '.join(missing)}")


if __name__ == "__main__":
    missing = missing_tools()
    if too_old := old_driver(driver_version()):
        missing.insert(0, too_old)
    if missing:
        sys.exit(f"error: {'; '.join(missing)}")
