# make demo    train the demo for real, with or without a GPU: .venv, pinned packages, python launch.py configs/tiny.py
# make quick   while you edit: formulas, packing, networks, settings, data, grader, in under a minute
# make test    the tests, on the CPU; they run in .venv, on a machine with a GPU in .venv-cpu
# make extras  install optional packages, without which some tests are skipped (requirements-extras.txt)
# make soak    the long tests, or one part of them: make soak-runs, soak-kills, soak-nodes, soak-grader, soak-others
# make gpu     the tests that need a GPU
# make lines   lines, tokens a line and longest functions, which never fail; then formatting and lint, which can

PYTHON ?= python3
REQUIREMENTS := $(shell nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
TESTS := $(if $(filter requirements.txt,$(REQUIREMENTS)),.venv-cpu,.venv)
CPU_WORKERS := $(if $(filter requirements-cpu.txt,$(REQUIREMENTS)),--workers=$(shell echo $$(( $$(nproc) > 1 ? 2 : 1 ))))
INSTALL = $(@D)/bin/pip install --quiet --no-compile --disable-pip-version-check $(FLAGS)

# Each part of the soak should take at most 40 minutes on two cores; the minutes below were measured on 2026-11-28.
# A long test in a file that no other part names belongs to soak-others.
SOAK = $(TESTS)/bin/python -m pytest -q -m soak --durations=5
RUNS = tests/test_resume.py tests/test_endings.py tests/test_launch.py tests/test_evaluate.py tests/test_plan.py
NODES = tests/test_nodes.py
GRADER = tests/test_reward.py tests/test_cheating.py
SOAK_PARTS = soak-runs soak-kills soak-nodes soak-grader soak-others

.PHONY: demo extras quick test soak $(SOAK_PARTS) gpu lines

demo: .venv/installed
	@n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; .venv/bin/python launch.py configs/tiny.py $(CPU_WORKERS) --name=demo-$$n

extras: $(TESTS)/installed
	@$(TESTS)/bin/pip install --quiet --no-deps --disable-pip-version-check -r requirements-extras.txt

quick: $(TESTS)/installed
	$(TESTS)/bin/python tests/quick.py

test: $(TESTS)/installed
	$(TESTS)/bin/python -m pytest -q --durations=10

soak:
	@$(MAKE) --no-print-directory --keep-going $(SOAK_PARTS)  # A part that fails does not keep the others from running.

soak-runs: $(TESTS)/installed
	@echo "$@: runs that are stopped, continued, refused, or fill the disk: about 12 minutes"
	$(SOAK) $(RUNS) -k "not kill"

soak-kills: $(TESTS)/installed
	@echo "$@: processes killed in every phase and at random moments: about 13 minutes"
	$(SOAK) $(RUNS) -k "kill"

soak-nodes: $(TESTS)/installed
	@echo "$@: two hosts on this machine, as root: about 3 minutes"
	$(SOAK) $(NODES)

soak-grader: $(TESTS)/installed
	@echo "$@: all pairs of references, and answers on a busy machine: about 3 minutes"
	$(SOAK) $(GRADER)

soak-others: $(TESTS)/installed
	@echo "$@: other architectures, models that are refused, and all other long tests: about 15 minutes"
	$(SOAK) $(addprefix --ignore=,$(RUNS) $(NODES) $(GRADER))

gpu: .venv/installed
	.venv/bin/python -m pytest -q -rs tests/test_gpu.py

lines: $(TESTS)/installed
	$(TESTS)/bin/python tests/count_lines.py
	$(TESTS)/bin/ruff format --check .
	$(TESTS)/bin/ruff check .

.venv/installed: FLAGS = $(if $(filter requirements-cpu.txt,$(REQUIREMENTS)),--no-deps) -r $(REQUIREMENTS)
.venv-cpu/installed: FLAGS = --no-deps -r requirements-cpu.txt

# CPU torch comes from wherever pip is configured to look, else from PyTorch's own index of CPU builds.
.venv/installed .venv-cpu/installed: requirements.txt requirements-cpu.txt
	@$(PYTHON) -c 'import platform, sys; sys.exit(0 if sys.platform == "linux" and platform.machine() == "x86_64" and \
	sys.version_info[:2] in ((3, 11), (3, 12)) else "error: this needs Linux on x86-64 and Python 3.11 or 3.12, not " \
	+ platform.platform() + ", Python " + platform.python_version() + "; give one of these with make PYTHON=python3.12 …")'
	@$(if $(filter requirements.txt,$(lastword $(FLAGS))),$(PYTHON) tools/gpu_machine.py)
	@echo "installing $(lastword $(FLAGS)) into $(@D): a few minutes, once"
	@$(PYTHON) -m venv $(@D)
	@$(INSTALL) 2>$(@D)/pip.log || $(INSTALL) $(if $(filter --no-deps,$(FLAGS)),--extra-index-url https://download.pytorch.org/whl/cpu)
	@$(@D)/bin/python -m compileall -q -j 0 $(@D)/lib >/dev/null 2>&1 || true  # on all cores; pip would use one
	@touch $@
