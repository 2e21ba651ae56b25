# make demo      the whole method on the embedded task, on this machine, in minutes
# make test      the fast tests, without torch
# make test-all  slow tests, live oracles and compiles for TPUs as well
# Every target makes the environment it needs in .venv (Python 3.11 to 3.13).

BACKEND ?= cpu
VENV    ?= .venv
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
ARGS    ?=
# One worker per core, a file stays on its worker: files share expensive fixtures. tests/conftest.py orders them.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

ifeq ($(filter cpu cuda tpu,$(BACKEND)),)
$(error BACKEND=$(BACKEND); wanted cpu, cuda or tpu)
endif

REQUIREMENTS_cpu  := requirements.txt
REQUIREMENTS_cuda := requirements-cuda.txt
REQUIREMENTS_tpu  := requirements-tpu.txt

.PHONY: demo test test-all tpu-compiler lint clean python
.DELETE_ON_ERROR:

demo: $(VENV)/.$(BACKEND)
	$(VENV)/bin/python run.py $(ARGS)

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not slow and not oracle" $(ARGS)

test-all: $(VENV)/.oracle tpu-compiler
	$(VENV)/bin/python -m pytest -q $(PARALLEL) $(ARGS)

# libtpu compiles TPU programs without a TPU. In a folder of its own: among the packages it would
# make every start of jax look for one.
tpu-compiler: $(VENV)/libtpu/.done

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check -q .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

python:
	@test -n "$(PYTHON)" || { echo "sdzero_jax needs Python 3.11, 3.12 or 3.13; found: $$(python3 --version 2>&1). Install one or pass PYTHON=/path/to/python." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); ok or print("sdzero_jax needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d." % sys.version_info[:2], file=sys.stderr); raise SystemExit(0 if ok else 2)'

$(VENV)/bin/python: | python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu $(VENV)/.cuda $(VENV)/.tpu: $(VENV)/.%: requirements.txt requirements-cuda.txt requirements-tpu.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r $(REQUIREMENTS_$*)
	@touch $@

$(VENV)/libtpu/.done: requirements.txt sdzero_jax/topology.py | $(VENV)/.cpu
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/libtpu \
		"$$($(VENV)/bin/python -c 'from sdzero_jax import topology; print(topology.libtpu_requirement())')"
	@touch $@

$(VENV)/.dev $(VENV)/.oracle: $(VENV)/.%: requirements.txt requirements-dev.txt requirements-oracle.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-$*.txt
	@touch $@
