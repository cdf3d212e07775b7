# make demo    train the demo for real, with or without a GPU: .venv, pinned packages, python launch.py configs/tiny.py
# make test    the tests, on the CPU: in .venv, or beside a GPU in .venv-cpu     make soak    the long ones
# make gpu     what only a GPU can show
# make lines   how the code reads (lines, tokens a line, longest functions), then formatting and lint, which alone can fail

PYTHON ?= python3
REQUIREMENTS := $(shell nvidia-smi >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
TESTS := $(if $(filter requirements.txt,$(REQUIREMENTS)),.venv-cpu,.venv)
CPU_WORKERS := $(if $(filter requirements-cpu.txt,$(REQUIREMENTS)),--workers=$(shell echo $$(( $$(nproc) > 1 ? 2 : 1 ))))
INSTALL = $(@D)/bin/pip install --quiet --no-compile --disable-pip-version-check $(FLAGS)

.PHONY: demo test soak gpu lines

demo: .venv/installed
	@n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; .venv/bin/python launch.py configs/tiny.py $(CPU_WORKERS) --name=demo-$$n

test: $(TESTS)/installed
	$(TESTS)/bin/python -m pytest -q --durations=10

soak: $(TESTS)/installed
	$(TESTS)/bin/python -m pytest -q -m soak

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
	+ platform.platform() + ", Python " + platform.python_version() + "; name one with make PYTHON=python3.12 …")'
	@$(if $(filter requirements.txt,$(lastword $(FLAGS))),$(PYTHON) tools/gpu_machine.py)
	@echo "installing $(lastword $(FLAGS)) into $(@D): a few minutes, once"
	@$(PYTHON) -m venv $(@D)
	@$(INSTALL) 2>$(@D)/pip.log || $(INSTALL) $(if $(filter --no-deps,$(FLAGS)),--extra-index-url https://download.pytorch.org/whl/cpu)
	@$(@D)/bin/python -m compileall -q -j 0 $(@D)/lib >/dev/null 2>&1 || true  # on all cores; pip would take one
	@touch $@
