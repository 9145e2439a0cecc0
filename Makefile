# make train: from a fresh clone to a learning curve.   make test: all tests.   make test-fast: all but the slow ones.
# They only need Python >= 3.11; every command they run is printed and can be typed by hand.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
WORKERS ?= 2
ARGS ?=

.PHONY: train test test-fast lint tiny bench-gpu clean

train: $(VENV)/runtime
	$(VENV)/bin/torchrun --nproc-per-node $(PROCESSES) train_rlpa.py --ckpt $(ARGS)

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/ -n $(WORKERS) --dist loadfile --benchmark-disable $(ARGS)

test-fast: $(VENV)/dev
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/ -n $(WORKERS) --dist loadfile --benchmark-disable -m "not slow" $(ARGS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

tiny: $(VENV)/runtime
	$(VENV)/bin/torchrun --nproc-per-node $(PROCESSES) -m tiny.make --out tiny

# On a GPU machine, with the Python that has its torch: make bench-gpu OUT=DIR PYTHON=python3 (then gpu.sh DIR more)
bench-gpu:
	@test -n "$(OUT)" || { echo "usage: make bench-gpu OUT=folder PYTHON=python3"; exit 2; }
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(OUT)

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/runtime requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
