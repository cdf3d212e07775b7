"""What a GPU machine lacks is reported in one line, before gigabytes are installed or networks are built."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import workers
from configs.load import ROOT
from tools import gpu_machine


def program(folder, name, text="exit 0"):
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def include(tmp_path):
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    return folder


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_either_compiler_will_do(tmp_path, include, compiler):
    program(tmp_path / "bin", compiler)
    assert gpu_machine.missing_tools({"PATH": str(tmp_path / "bin")}, include) == []


def test_compiler_that_is_missing(tmp_path, include):
    """Fails if a missing compiler is not reported before the start: Triton would fail in the middle of vLLM's, with a
    page of text."""
    (missing,) = gpu_machine.missing_tools({"PATH": str(tmp_path)}, include)
    assert "no C compiler (gcc or clang)" in missing and "apt-get install build-essential" in missing
    program(tmp_path / "bin", "gcc")
    named = {"PATH": str(tmp_path / "bin"), "CC": "/no/such/cc"}
    (missing,) = gpu_machine.missing_tools(named, include)
    assert "no C compiler (/no/such/cc)" in missing
    program(tmp_path / "bin", "my-cc")
    assert gpu_machine.missing_tools(named | {"CC": str(tmp_path / "bin/my-cc")}, include) == []


def test_python_h_that_is_missing(tmp_path):
    program(tmp_path / "bin", "gcc")
    (missing,) = gpu_machine.missing_tools({"PATH": str(tmp_path / "bin")}, tmp_path / "none")
    assert "Python.h" in missing and f"python{sys.version_info[0]}.{sys.version_info[1]}-dev" in missing


def test_drivers():
    """Fails if driver versions are compared as text, in which 1000 comes before 580."""
    assert [gpu_machine.old_driver(version) for version in ("580.65.06", "580", "1000.1")] == [None] * 3
    for version in ("570.124.06", "575.0", "99.1", "N/A"):
        assert f"580 or newer, not {version}" in gpu_machine.old_driver(version)
    assert "not none" in gpu_machine.old_driver("")


def test_reasons_for_an_unseen_gpu():
    """If torch sees no GPU, the message names the reason: a build without CUDA, an old driver, or neither of them."""
    assert "without CUDA" in gpu_machine.unseen_gpu("2.13.0+cpu", None, "580.1")
    assert "580 or newer, not 570.1" in gpu_machine.unseen_gpu("2.13.0", "13.0", "570.1")
    healthy = gpu_machine.unseen_gpu("2.13.0", "13.0", "580.1")
    assert "the NVIDIA driver is 580.1" in healthy and "torch.cuda.init()" in healthy


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that sees no GPU")
def test_a_worker_says_which_node_cannot_use_its_gpu():
    """Fails if a Worker to which Ray gives a GPU would train on the CPU instead, a hundred times slower."""
    with pytest.raises(
        RuntimeError, match=r"^node 10\.0\.0\.7 cannot use its GPU: torch .* sees no GPU"
    ) as caught:
        gpu_machine.check_worker("10.0.0.7")
    assert "\n" not in str(caught.value)


def test_environment_of_a_worker():
    """Fails if each Worker may start 32 compile processes, or if the first all-reduce may take minutes to compile."""
    for on_gpu in (False, True):
        env = workers.worker_environment(SimpleNamespace(workers=1), on_gpu)
        assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
        assert env["VLLM_ALLREDUCE_USE_FLASHINFER"] == "0"


@pytest.mark.parametrize("driver, expected", [("570.124.06", 2), ("580.65.06", 0)])
def test_make_asks_before_it_installs(tmp_path, driver, expected):
    """Fails if three gigabytes of CUDA libraries are installed with which torch could not use this driver."""
    for file in ("Makefile", "requirements.txt", "requirements-cpu.txt"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    program(tmp_path / "bin", "nvidia-smi", f"echo {driver}")
    program(tmp_path / "bin", "gcc")
    # This Python does everything but make an environment; that call stands for the installation.
    program(
        tmp_path / "bin", "python", f'case "$*" in *venv*) echo VENV;; *) exec {sys.executable} "$@";; esac'
    )
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["make", f"PYTHON={tmp_path}/bin/python", ".venv/installed"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ("VENV" in done.stdout) == (expected == 0), done.stdout + done.stderr
    if expected:
        assert done.returncode == expected and done.stderr.startswith(
            "error: torch 2.13 needs the NVIDIA driver 580"
        )
        assert "installing" not in done.stdout


@pytest.mark.parametrize("wrong, words", [("/no/such/folder", "is not a folder"), ("", "has no torch")])
def test_gpu_check_refuses_in_one_line(tmp_path, wrong, words):
    """Fails if ten minutes of a rented GPU are spent on steps that must all fail."""
    program(tmp_path, "python", "exit 1")
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
    command = ["bench/gpu_check.sh", *([wrong] if wrong else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and words in line
    assert not (tmp_path / "out").exists()


FAKE_GPU = """
import functools, ray, sys, launch
ray.init = functools.partial(ray.init, num_gpus=1)  # this machine's Ray, as if it had a GPU
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("gpu_memory", ["0", "1000"])
def test_a_run_ends_in_one_line(tmp_path, gpu_memory):
    """Fails if no Worker calls the check, or if it calls it only after its GPU's memory was asked for (with
    gpu_memory=0)."""
    # Ray reads RAY_AUTH_MODE when it is imported, here before launch.py sets it.
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "CUDA_VISIBLE_DEVICES": "0"}
    arguments = ["configs/tiny.py", f"--out_dir={tmp_path}", "--name=a", f"--gpu_memory={gpu_memory}"]
    command = [sys.executable, "-c", FAKE_GPU, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.match(r"error: RuntimeError: node \S+ cannot use its GPU: torch ", last), (
        done.stdout + done.stderr
    )
    assert not any((tmp_path / "a/logs").glob("worker_*"))  # no Worker has begun its log
