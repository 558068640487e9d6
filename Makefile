PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pair of JAX and Flax that a newer Python resolves to.
NEXT_PYTHON ?= python3.13
# Two files of tests at a time: a worker takes up to 6 GB.
PYTEST_FLAGS ?= --numprocesses=2 --dist=loadfile
# What `make check` leaves out, by marker (pyproject.toml).
CHECKED := not (torch or tpu or processes or wheel or slow)
TREE_TESTS := tests/models tests/decoding tests/serving tests/training/test_step.py

.PHONY: help demo demo-tiny new-objects check test test-next mutate test-tree lint bench convert-7b plan-7b weights clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.stamp: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; name a newer one: make test PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,eval]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,eval,dev,parquet]'
	@touch $@

# The suite also needs PyTorch: it reads real pickles, and compares with transformers; and libtpu:
# it compiles a small step for TPUs.
$(VENV)/.stamp-all: $(VENV)/.stamp-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,eval,dev,hf,parquet,tpu]'
	@touch $@

demo: $(VENV)/.stamp  ## PictoTalk from raw data to a report: about 15 minutes on two cores
	PYTHON=$(BIN)/python launch/demo.sh demo

demo-tiny: $(VENV)/.stamp-dev  ## the same, very small, in a new folder; its page is opened in Chromium
	out=$$(mktemp -d) && DATA=$$out/data RUNS=$$out/runs LIMIT=2 PYTHON=$(BIN)/python \
	  launch/demo.sh tiny && $(BIN)/python -m tests.open_page $$out/runs/tiny/report.html \
	  --screenshots=$$out

new-objects: $(VENV)/.stamp  ## fine-tune the shipped decoder on new objects, report before and after
	PYTHON=$(BIN)/python launch/demo.sh new_objects

check: $(VENV)/.stamp-dev  ## run what takes two minutes, without PyTorch and libtpu
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "$(CHECKED)"

test: $(VENV)/.stamp-all  ## run the suite
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-next:  ## run the suite on a newer Python with the JAX and Flax that it resolves to
	$(MAKE) test VENV=.venv-next PYTHON=$(NEXT_PYTHON)

mutate: $(VENV)/.stamp-dev  ## change training/ and data/ and list what no test notices, docs/testing.md: hours
	$(BIN)/python -m tests.mutation $(MUTATE)

test-tree: $(VENV)/.stamp-all  ## run the parts that use Flax in its coming tree mode
	NNX_GRAPH_MODE=false $(BIN)/python -m pytest $(PYTEST_FLAGS) $(TREE_TESTS)

lint: $(VENV)/.stamp-dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.stamp-all  ## benchmarks beside their peers, one JSON line each
	for name in train_step decode data codecs first_answer; do $(BIN)/python -m benchmarks.$$name; done

convert-7b: $(VENV)/.stamp-all  ## convert a random 7B there and back: 45 GB of disk, about 10 minutes
	$(BIN)/python -m benchmarks.convert --verify

plan-7b: $(VENV)/.stamp-all  ## compile the 7B step for every machine, tables in docs/scale.md: an hour
	$(BIN)/python -m benchmarks.scale

weights: $(VENV)/.stamp  ## rebuild every shipped weight into runs/weights: about two hours
	PYTHON=$(BIN)/python launch/weights.sh

clean:  ## remove the environment and everything built
	rm -rf $(VENV) .venv-next build dist *.egg-info
