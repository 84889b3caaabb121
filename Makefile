# make demo    the first study, on a machine with Python >= 3.11, git and make
# make test    the whole test-suite
# make help    the rest

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.ready
PYTHON  ?=
TRIED   := $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3 python)
FIND    := for p in $(TRIED); do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
             { echo "$$p"; break; }; done
OUT     ?= runs/demo
INSTALL := $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
# What only some users need; the tests of these skip without them.
EXTRAS  := hf,onnx,entropy,mesh,kernels
# Tests compare with these two. They ask for torchvision, which they use in their examples only.
PEERS   := curvlinops-for-pytorch backpack-for-pytorch
# The Python whose torch sees the card, and its packages: by default the one on the path, not .venv.
ACCELERATED := TYPECHECK=0 PYTHONPATH=src $(or $(PYTHON),python3)
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-extras nightly wheel lint format docs bench accelerator clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1:/p' $(firstword $(MAKEFILE_LIST)) | awk -F: '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install into it (once)

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND)); test -n "$$python" || { printf '%s\n' \
	  "No Python 3.11 or newer was found (tried: $(TRIED))." 'matrigami needs at least 3.11.' \
	  'Install it, or say where it is: make setup PYTHON=/path/to/python3.12' >&2; exit 2; }; \
	echo "Setting up $(VENV) with $$($$python --version). pip will now fetch, unless it has them already:"; \
	echo '  torch, numpy, scipy, safetensors, click, jaxtyping, matplotlib, scikit-learn and the test tools,'; \
	echo '  at the versions in constraints.txt: about 400 MB with a CPU build of torch.'; \
	test -n "$(TORCH_INDEX)" || { \
	echo '  On Linux the default build of torch adds about 3 GB of CUDA libraries. For a CPU build press Ctrl-C and run'; \
	echo '    make $(or $(firstword $(MAKECMDGOALS)),setup) TORCH_INDEX=URL'; \
	echo "  where URL is the CPU index named on PyTorch's installation page."; }; \
	echo "  pip's own configuration (mirrors, wheels, certificates) stays in force."; \
	test -x $(BIN)/python || "$$python" -m venv $(VENV) || { rm -rf $(VENV); printf '%s\n' \
	  'The virtual environment could not be made.' 'On Debian and Ubuntu its module is a package of its own.' \
	  'Run: apt install python3-venv' >&2; exit 2; }
	@$(INSTALL) -e '.[plots,data,dev,peers,mesh]'
	@$(INSTALL) --no-deps $(PEERS)
	@touch $@

demo: setup  ## a small scaling study with real data, under 4 minutes on 2 cores; OUT=DIR
	@$(BIN)/matrigami study run --preset demo --out $(OUT)

test: setup  ## the whole test-suite, in two passes
	@echo '== 1 of 2: run-time shape checks on'
	@TYPECHECK=1 $(BIN)/python -m pytest -q -n 2 --durations=20
	@echo '== 2 of 2: torch.compile and torch.export'
	@TYPECHECK=0 $(BIN)/python -m pytest -q -n 2 -m 'compile and not slow'

test-extras: setup  ## install the extras hf, onnx, entropy, mesh and kernels, and run the tests that are skipped without them
	@$(INSTALL) -e '.[plots,data,dev,$(EXTRAS)]'
	@TYPECHECK=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 \
	  $$(grep -rlE --include='test_*.py' "needs the extra ($$(echo $(EXTRAS) | tr , '|'))\"" tests)

nightly: setup  ## the slow tests, with more random examples
	TYPECHECK=1 $(BIN)/python -m pytest -q -n 2 -m slow --hypothesis-profile=nightly
	TYPECHECK=0 $(BIN)/python -m pytest -q -m compile

wheel: setup  ## build the wheel from the source archive, and try it outside the repository
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

lint: setup  ## style, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

format: setup  ## rewrite the files in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs: $(STAMP)
	$(INSTALL) --quiet -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the site, in site/
	@PYTHONPATH=docs PYTHONDONTWRITEBYTECODE=1 $(BIN)/zensical build --strict --clean
	@echo 'Open site/index.html; for the search: $(BIN)/python -m http.server -d site'

accelerator:  ## on a machine with a CUDA card: its tests, benchmarks and the published CIFAR-100 study; OUT=DIR
	$(ACCELERATED) -m pytest -q -m gpu tests
	$(ACCELERATED) -m benchmarks.accelerator $(OUT)/benchmarks
	$(ACCELERATED) -m matrigami.cli study run --preset cifar100_published --device cuda --out $(OUT)/cifar100_published

bench: setup  ## time of the layers against nn.Linear, of curvature and of the optimisers
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.optimizers

clean:  ## remove what the tools made; studies in runs/ stay
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
