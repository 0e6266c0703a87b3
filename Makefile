# Two commands do everything on a fresh machine with Python >= 3.11:
#   make demo   from a .graft file to a distilled, exported, verified model on real images
#   make test   lint, types, tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := cpu,train,diffusers,transformers,report,lsp,tensorboard,examples,serve,dev
SOURCES := graftc tests examples benchmarks

.PHONY: demo test lint format table slow fuzz bench matrix clean

# torch first, and exactly: another specifier may bring gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/digits/demo.py $(if $(QUICK),--quick) --out out/demo

test: lint
	$(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The full digits table of README, about an hour on two cores.
table: $(VENV)/.installed
	$(BIN)/python examples/digits/table.py --out examples/digits/results

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

# 20,000 hostile texts through `check` and `fmt`; as many again by atheris, where it installs.
fuzz: $(VENV)/.installed
	-$(BIN)/pip install --quiet atheris
	$(BIN)/python tests/language/fuzz.py --count 20000

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

# docs/models.md, about an hour on two cores; models that have a result in out/models/ are not run again.
matrix: $(VENV)/.installed
	$(BIN)/python -m tests.models.matrix

clean:
	rm -rf $(VENV) out build dist *.egg-info
