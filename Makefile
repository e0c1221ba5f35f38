# One command per purpose; the first one builds .venv, later ones reuse it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ONE_THREAD := OMP_NUM_THREADS=1
# Two processes, each with whole files: jobs that several tests look at are started once.
PYTEST := $(ONE_THREAD) $(BIN)/pytest -n 2 --dist loadfile

# The constraints hold for the isolated build of the package itself, too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
# DeepSpeed is pure Python then.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where this is set, each of the many processes of the tests would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE

# Other libraries' models, with the torch of constraints.txt. ultralytics asks for an OpenCV that needs a display.
ZOO := .venv-zoo
ULTRALYTICS := ultralytics==8.4.190
OFFLINE := HF_HUB_OFFLINE=1 YOLO_OFFLINE=true YOLO_CONFIG_DIR=$(ZOO)
# Another torch lies in an environment of its own: its full wheel, with what it brings along, takes 5 to 7 GB.
TORCH := .venv-torch-$(VERSION)
UNITS := $(wildcard tests/test_*.py)
STUDIES := architecture bench cli docs gpu_check help plan plan_command quality quality_images site suite wheel
CORE := $(filter-out $(STUDIES:%=tests/test_%.py),$(UNITS)) \
	tests/laws tests/moving $(addprefix tests/distributed/test_,backends.py ddp_buffers.py sync_batch_norm_ddp.py)

.DEFAULT_GOAL := help
.PHONY: help demo demo-full test test-all test-torch test-faults soak check bench gpu-check \
	docs integrations zoo scripts clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# Python compiles what is imported; pip would compile all of it, for half a minute.
	$(BIN)/pip install --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## train the example with 2 processes and compare the recipes
	$(ONE_THREAD) $(BIN)/torchrun --standalone --nproc_per_node 2 examples/train_digits.py --compare

demo-full: $(STAMP) ## train what docs/quality.md still lacks, and write its tables
	PATH="$(CURDIR)/$(BIN):$$PATH" YIELD=1 $(ONE_THREAD) launch/mpirun.sh 2 benchmarks/quality.py
	$(BIN)/python benchmarks/quality_report.py

check: $(STAMP) ## lint, format, types, import floors, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

test: check ## check, then the tests that fit in minutes
	$(PYTEST) -m "not slow and not gpu"

test-all: check ## check, then every test that needs no GPU
	$(PYTEST) -m "not gpu"

$(TORCH)/.installed: constraints.txt
	@test -n "$(VERSION)" || { echo "Which one? make test-torch VERSION=2.11.0"; exit 2; }
	test -x $(TORCH)/bin/python || $(PYTHON) -m venv $(TORCH)
	grep -vE '^(numpy|setuptools|torch|triton)==' constraints.txt > $(TORCH)/constraints.txt
	# numpy 2.4 made an error of what the interpreter of Triton 3.6 does.
	PIP_CONSTRAINT=$(TORCH)/constraints.txt $(TORCH)/bin/pip install \
		'torch==$(VERSION)' 'numpy<2.4' pytest pytest-timeout pytest-xdist hypothesis pyyaml
	touch $@

test-torch: $(TORCH)/.installed ## run the core tests against another torch: make test-torch VERSION=2.11.0
	PYTHONPATH=. $(ONE_THREAD) $(TORCH)/bin/pytest -n 2 --dist loadfile -m "not slow and not gpu" $(CORE)

test-faults: $(STAMP) ## disturb jobs in every way of the fault table, in under 10 minutes, and write docs/faults.md
	$(BIN)/python -m tests.faults.table

MINUTES := 5
soak: $(STAMP) ## train and restart random jobs of 4 ranks, checking all they do: make soak MINUTES=5
	$(ONE_THREAD) $(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

bench: $(STAMP) ## measure every figure of docs/performance.md, in under 15 minutes, and write its tables
	$(BIN)/python benchmarks/suite.py

gpu-check: ## check and time norms on an NVIDIA card, with a Python that has torch and Triton: ARGS="--stages abcd"
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) benchmarks/gpu_check.py $(ARGS)

docs: $(STAMP) ## write the generated parts of the documentation anew, and build its pages in site/
	$(BIN)/python docs/generate.py
	$(BIN)/python benchmarks/recipes_picture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

integrations: $(STAMP) ## run every launcher and framework with 2 processes, and write docs/integrations.md's tables
	$(BIN)/python -m tests.integrations.table

$(ZOO)/.installed: constraints-zoo.txt
	test -x $(ZOO)/bin/python || $(PYTHON) -m venv $(ZOO)
	PIP_CONSTRAINT= $(ZOO)/bin/pip install -r constraints-zoo.txt
	PIP_CONSTRAINT= $(ZOO)/bin/pip install --no-deps '$(ULTRALYTICS)'
	touch $@

zoo: $(ZOO)/.installed ## convert a model of each family of timm and six other libraries, and write docs/zoo.md
	PYTHONPATH=. $(ONE_THREAD) $(OFFLINE) $(ZOO)/bin/python -m tests.models.table --jobs 2

scripts: $(STAMP) $(ZOO)/.installed ## run training scripts as others write them, and write their table in docs/integrations.md
	$(BIN)/python -m tests.integrations.scripts_table

clean: ## remove .venv, caches and build products
	rm -rf .venv .venv-torch-* .venv-zoo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
