# Everything runs from one virtual environment, .venv, which the first target to need it creates.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
SANITIZERS := address,undefined thread
OUT ?= demo_out
OLDEST_TRITON := 3.6.0
OLDEST_TRANSFORMERS := 5.10.4
# The one for torch of requirements-dev.txt.
TORCHVISION := 0.28.0
# kvpress wants an older transformers than ours: an environment of its own.
KVPRESS := torch==2.13.0 triton==3.9.0 kvpress==0.5.5 pytest hypothesis
# KiB: 5 MB.
WHEEL_LIMIT := 4882
# Benchmarks that run in processes of their own; the results of all others are cpu.jsonl.
ALONE := generate policy_loss
# $(call race,what pytest collects,name of the results)
race = $(PY) -m pytest $(1) --benchmark-columns=median,min,iqr,rounds --benchmark-sort=min $(if $(RESULTS),--save-results $(RESULTS)/$(2).jsonl)

# $(call timed,name,command): runs a command and prints how long it took.
timed = @echo "== $(1)"; start=$$(date +%s); $(2) && echo "== $(1) took $$(($$(date +%s) - start)) s"

.PHONY: help dev demo results study walkthroughs emulated test aot cuda mutants bench gpu lint format sanitize wheel nightly doctor clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 16

$(VENV)/.installed: requirements-dev.txt
	$(call timed,creating $(VENV),$(PYTHON) -m venv $(VENV) && $(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt && touch $@)

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(call timed,building the native module,$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . && touch $@)

dev: $(VENV)/.built  ## create .venv and build the native module into the checkout

demo: $(VENV)/.built  ## run the main job on a clip that it renders itself
	$(call timed,demo,$(PY) -m cacovid_kernels demo --out $(OUT))

results: $(VENV)/.built  ## what the procedural world's policy keeps of the answers, beside other rules: docs/results
	$(call timed,results,$(PY) -m cacovid_kernels.demo.world.evaluate --out docs/results/compression.json && $(PY) -m cacovid_kernels.demo.world.report docs/results)

study: $(VENV)/.built  ## which sampler learns fastest: 27 short trainings, one after another; what is in the file is not run again
	$(call timed,study,$(PY) -m cacovid_kernels.demo.world.study --out docs/results/samplers.jsonl && $(PY) -m cacovid_kernels.demo.world.report docs/results)

walkthroughs: $(VENV)/.built  ## run examples/walkthroughs and write them as notebooks with their outputs: docs/walkthroughs
	$(call timed,walkthroughs,$(PY) docs/walkthroughs/render.py)

# For tests: `python -m pytest` would import the checkout instead of build/emulated.
emulated: $(VENV)/.built
	$(call timed,building the CUDA kernels for the CPU,$(PY) tests/cuda/emulate.py)

build/transformers-$(OLDEST_TRANSFORMERS): $(VENV)/.installed
	$(call timed,fetching transformers $(OLDEST_TRANSFORMERS),$(PY) -m pip install -q --disable-pip-version-check --target $@.part transformers==$(OLDEST_TRANSFORMERS) && mv $@.part $@)

# What processors import. Not in .venv: without dependencies, and the other tests show that nothing else needs it.
build/torchvision-$(TORCHVISION): $(VENV)/.installed
	$(call timed,fetching torchvision $(TORCHVISION),$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $@.part torchvision==$(TORCHVISION) num2words==0.5.14 && mv $@.part $@)

test: emulated build/transformers-$(OLDEST_TRANSFORMERS) build/torchvision-$(TORCHVISION)  ## run the tests, those of the Triton kernels in its interpreter, of the CUDA kernels on the CPU
	$(call timed,tests,$(PY) -m pytest tests)
	$(call timed,the oldest transformers,PYTHONPATH=build/transformers-$(OLDEST_TRANSFORMERS) $(PY) -m pytest tests/test_hf_*.py)
	$(call timed,real processors,for older in "" build/transformers-$(OLDEST_TRANSFORMERS):; do PYTHONPATH=$${older}build/torchvision-$(TORCHVISION) $(PY) -m pytest tests/test_hf_processors.py || exit 1; done)
	$(call timed,kernels in the interpreter,TRITON_INTERPRET=1 $(PY) -m pytest tests/triton)
	$(call timed,CUDA kernels on the CPU,PYTHONPATH=build/emulated $(BIN)/pytest tests/cuda)

build/triton-$(OLDEST_TRITON): $(VENV)/.installed
	$(call timed,fetching Triton $(OLDEST_TRITON),$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $@.part triton==$(OLDEST_TRITON) && mv $@.part $@)

aot: $(VENV)/.built build/triton-$(OLDEST_TRITON)  ## compile every Triton kernel for sm_80, 90 and 100, for sm_90 with the oldest Triton too; no GPU
	$(call timed,kernels ahead of time,$(PY) tests/triton/aot.py && PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PY) tests/triton/aot.py 90)

cuda: $(VENV)/.installed  ## compile the CUDA kernels for every architecture and check what came out; needs nvcc, no GPU
	$(call timed,CUDA kernels ahead of time,$(PY) tests/cuda/compile.py)

mutants: $(VENV)/.built  ## plant a few bugs per family of kernels; the tests must find each (`make nightly`: all)
	$(call timed,mutants,$(PY) tests/triton/mutate.py --each 3 && $(PY) tests/cuda/mutate.py --each 2)

bench: $(VENV)/.built  ## time every op beside its baselines; RESULTS=FOLDER saves medians and ratios
	$(call timed,benchmarks,$(call race,bench $(ALONE:%=--ignore=bench/bench_%.py),cpu)$(foreach name,$(ALONE), && $(call race,bench/bench_$(name).py,$(name))))

gpu:  ## evidence on a GPU, with its own python3: PART=tests|bench|sanitize|profile, DRY=1 without a GPU
	$(call timed,gpu,$(PYTHON) bench/gpu.py $(if $(PART),--part $(PART)) $(if $(DRY),--dry-run) $(if $(RESULTS),--results $(RESULTS)) $(FLAGS))

lint: $(VENV)/.installed  ## ruff, mypy, clang-format
	$(call timed,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.inl %.cu %.cuh,$(SOURCES)))

format: $(VENV)/.installed  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/clang-format -i $(filter %.cpp %.h %.inl %.cu %.cuh,$(SOURCES))

sanitize: $(VENV)/.installed  ## run the C++ suite, CUDA kernels among it, under ASan, UBSan and TSan
	$(call timed,sanitizers,for s in $(SANITIZERS); do PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/$$s -G Ninja -DCMAKE_BUILD_TYPE=Release -DCACOVID_CUDA=0 -DCACOVID_SANITIZE=$$s >/dev/null && PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/$$s && PATH="$(CURDIR)/$(BIN):$$PATH" ctest -j2 --test-dir build/$$s --output-on-failure || exit 1; done)

wheel: $(VENV)/.installed  ## build the wheel as pip does, without torch, and check its size
	$(call timed,wheel,$(PY) -m pip wheel -q --disable-pip-version-check --no-deps -w dist . && ls -l dist && ! find dist -name '*.whl' -size +$(WHEEL_LIMIT)k | grep .)

build/kvpress/.installed: Makefile
	$(call timed,creating build/kvpress,$(PYTHON) -m venv build/kvpress && build/kvpress/bin/python -m pip install -q --disable-pip-version-check $(KVPRESS) && touch $@)

nightly: emulated build/triton-$(OLDEST_TRITON) build/kvpress/.installed  ## the slow checks: exhaustive and statistical, every planted bug, kvpress itself
	$(call timed,nightly,$(PY) -m pytest tests -m nightly && PYTHONPATH=. build/kvpress/bin/python -m pytest tests/test_integrations_kvpress.py && PYTHONPATH=build/emulated $(BIN)/pytest tests/cuda -m nightly && $(PY) tests/triton/mutate.py && $(PY) tests/cuda/mutate.py && PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PY) tests/triton/aot.py 80 100)

doctor: $(VENV)/.built  ## say what is built and which backends work
	$(PY) -m cacovid_kernels doctor

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info cacovid_kernels/_C*.so $(OUT)
