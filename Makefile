# Everything runs in .venv, which `make setup` makes with python3 and its venv module alone.
# PYTHON=... chooses the interpreter; ARGS=... is handed to the program that a target runs.

BIN := .venv/bin
ARGS ?=
export PYTHON

.PHONY: help setup demo test smoke k8s-testenv k8s k8s-chaos chaos check format golden bench gpu wheel clean

help:  ## Say what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup:  ## Make .venv; does nothing when that is done already
	@scripts/setup

demo: setup  ## Train a digit classifier on 4 workers, and check what comes out
	$(BIN)/ringps run -n 4 examples/digits.py $(ARGS)

SMOKE := $(addprefix tests/parallel/,test_benchmarks.py test_checkpoint_job.py test_checkpoint_kills.py \
	test_coordinator_fuzz.py test_examples.py test_faults.py test_gpu_job.py test_pods.py test_shaped_links.py \
	test_shared_memory_job.py) \
	$(addprefix tests/single/,test_gpu_benchmark.py test_worker_fuzz.py)
K8S := tests/k8s --ignore=tests/k8s/test_random_faults.py
REHEARSED := $(addprefix tests/gpu/,test_collectives.py test_training.py test_recovery.py)

test: setup  ## Run the tests (ARGS="tests/single -k ring"), but for those of `make smoke`
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n 2 tests/single $(SMOKE:%=--ignore=%)
	$(BIN)/python -m pytest tests/parallel $(SMOKE:%=--ignore=%)
else
	$(BIN)/python -m pytest $(ARGS)
endif

smoke: setup  ## Test benchmarks and examples from end to end, and what takes long
	$(BIN)/python -m pytest $(SMOKE) $(ARGS)
	@# Those for a GPU, on a pretended one; what cannot be pretended is skipped.
	RINGPS_TEST_PRETEND=1 RINGPS_TEST_NO_SKIP= $(BIN)/python -m pytest $(REHEARSED)

k8s-testenv:  ## Build the control plane for `make k8s`; does nothing when that is done already
	@scripts/k8s_testenv

k8s: setup k8s-testenv  ## Test against a real Kubernetes control plane (ARGS="-k submit"); nodes need root
ifeq ($(strip $(ARGS)),)
	@# Much of it is waiting, so there are two at a time, each with a control plane of its own.
	$(BIN)/python -m pytest -n 2 --dist worksteal $(K8S)
else
	$(BIN)/python -m pytest $(K8S) $(ARGS)
endif

k8s-chaos: setup k8s-testenv  ## Train in pods under 30 random faults; RINGPS_TEST_SEED repeats a run
	$(BIN)/python -m pytest -s tests/k8s/test_random_faults.py $(ARGS)

chaos: setup  ## Train under random faults (ARGS="--faults 2000 --seed 1")
	$(BIN)/python scripts/chaos.py $(ARGS)

check: setup  ## Lint, check format, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/single/test_pure_imports.py

format: setup  ## Format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

golden: setup  ## Record the golden files of the tests anew; then read the diff
	$(BIN)/python -m pytest -q tests/single --regenerate $(ARGS)

bench: setup  ## Run the benchmarks and write docs/benchmarks.md (ARGS="--only train -n 2")
	$(BIN)/python benchmarks/suite.py $(ARGS)

gpu:  ## Test and measure on this machine's GPUs (ARGS="--tests"); needs no set-up where PYTHON has it all
	@scripts/gpu $(ARGS)

wheel: setup  ## Build dist/*.whl
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove everything that was made
	rm -rf .venv build dist benchmarks/out *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
