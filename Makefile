# Everything here sets up what it needs. PYTHON is any Python from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# The suite reads the bundled model and models made on the spot; it never asks the Hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# A worker for each core: threads of their own would only wait for each other.
test test-all test-matrix test-served coverage architectures fuzz attack: export OMP_NUM_THREADS := 1

ORACLES := transformer-lens captum sae-lens dictionary-learning eai-sparsify

.PHONY: demo test test-ci test-all test-matrix test-served coverage architectures proofs oracle fuzz attack \
	check format docs bench bench-peers bench-serving bench-harvest attack-server clean

demo: $(VENV)/runtime
	@$(BIN)/python examples/main_demo.py

# The tests that changes break most: CI runs those marked thorough too.
test: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not thorough"

# As many random jobs and programs as a change has to stand before it lands: those of `make fuzz`
# and `make attack` are more.
test-ci test-all test-matrix: export INSITU_JOINED ?= 100
test-ci test-all test-matrix: export INSITU_MUTATIONS ?= 10000
test-all test-matrix: export INSITU_PROGRAMS ?= 2000
test-all test-matrix: export INSITU_STEP_PROGRAMS ?= 160
test-all test-matrix: export INSITU_GRADIENT_PROGRAMS ?= 160

test-ci: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

test-all: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS)

# Which lines the tests run, and a floor below which this fails: see pyproject.toml. COVERED takes
# a part of the suite, as in `make coverage COVERED="tests/graph --cov-fail-under=0"`.
COVERED ?= -m "not slow"
coverage: $(VENV)/installed
	$(BIN)/pytest -n $(WORKERS) --cov --cov-report=term --cov-report=html:build/coverage $(COVERED)

NEWEST := $(BIN)/python
OLDEST := $(VENV)-transformers4/bin/python
VERSION := -c "from importlib.metadata import version; print(version('transformers'))"
# What works on which architecture, from the results of tests. One that fails is in the page.
WRITE_ARCHITECTURES = $(NEWEST) -m tests.fidelity.capabilities docs/architectures.md \
	$$($(NEWEST) $(VERSION))=build/newest.xml $$($(OLDEST) $(VERSION))=build/oldest.xml

# The suite with the newest Transformers and with the oldest generation that is supported.
test-matrix: $(VENV)/installed $(VENV)-transformers4/installed
	$(NEWEST) -m pytest -n $(WORKERS) --junit-xml=build/newest.xml
	$(OLDEST) -m pytest -n $(WORKERS) --junit-xml=build/oldest.xml
	$(WRITE_ARCHITECTURES)

ARCHITECTURES = tests/fidelity/test_standard_names.py tests/fidelity/test_architectures.py \
	tests/fidelity/test_every_architecture.py $(wildcard tests/fidelity/test_named_*.py)

# The same page from the tests of architectures alone.
architectures: $(VENV)/installed $(VENV)-transformers4/installed
	-$(NEWEST) -m pytest -n $(WORKERS) $(ARCHITECTURES) --junit-xml=build/newest.xml
	-$(OLDEST) -m pytest -n $(WORKERS) $(ARCHITECTURES) --junit-xml=build/oldest.xml
	$(WRITE_ARCHITECTURES)

# The proofs of standard names that the package ships: see src/insitu/models/proof/remembered.py.
proofs: $(VENV)/installed $(VENV)-transformers4/installed
	$(NEWEST) -m tests.fidelity.proofs src/insitu/models/proof/shipped
	$(OLDEST) -m tests.fidelity.proofs src/insitu/models/proof/shipped

# What peers make of the same weights, files and prompts, each in an environment of its own:
# TransformerLens's hooks, captum's attributions and SAELens's features, beside ours. And what
# SAELens, dictionary_learning and eai-sparsify learn from a folder of activations, beside what
# they learn from a model.
oracle: $(VENV)/installed $(ORACLES:%=$(VENV)-%/installed)
	INSITU_TRANSFORMER_LENS=$(VENV)-transformer-lens/bin/python \
		INSITU_CAPTUM=$(VENV)-captum/bin/python INSITU_SAE_LENS=$(VENV)-sae-lens/bin/python \
		INSITU_DICTIONARY_LEARNING=$(VENV)-dictionary-learning/bin/python \
		INSITU_EAI_SPARSIFY=$(VENV)-eai-sparsify/bin/python \
		$(BIN)/pytest tests/oracle/agreement.py tests/oracle/attribution.py \
		tests/oracle/agreement_on_saes.py tests/oracle/agreement_on_training.py

# What the tests of these folders trace is sent to a server too, and compared.
test-served: $(VENV)/installed
	INSITU_SERVED=1 $(BIN)/pytest -n $(WORKERS) tests/fidelity tests/methods

# Many more of the random programs that the suite compares with plain PyTorch hooks.
fuzz: $(VENV)/installed
	INSITU_PROGRAMS=40000 INSITU_STEP_PROGRAMS=5000 INSITU_GRADIENT_PROGRAMS=5000 \
	$(BIN)/pytest -n $(WORKERS) tests/fidelity/test_programs.py \
	tests/fidelity/test_step_programs.py tests/fidelity/test_gradient_programs.py

# Many more of the jobs that the suite changes at random, reads and runs under limits.
attack: $(VENV)/installed
	$(BIN)/python -m tests.attack.mutated_jobs 1000000 --runs 100000

# Hostile jobs through a real server, with neighbours whose results are compared meanwhile.
attack-server: $(VENV)/installed
	$(BIN)/python -m tests.attack.hostile_server 50000

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every code block of the pages is run by the tests; here the notebooks are, and those blocks that
# end in pictures. Links are checked. Threads slow the bundled model down: it is too small for them.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 INSITU_PROGRESS=0 PLOTLY_RENDERER=png PYTHONWARNINGS=ignore TQDM_DISABLE=1 \
		OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/caches.py
	$(BIN)/python benchmarks/methods.py

# A server and its users, beside the same server that joins nothing, and nnsight one by one.
bench-serving: $(VENV)/installed $(VENV)-nnsight/installed
	$(BIN)/python benchmarks/serving.py --nnsight $(VENV)-nnsight/bin/python \
		--write benchmarks/RESULTS.md

# A harvest beside loops by hand, and beside the cache runner of SAELens:
# as it is, and as it was when the limits were set.
SAE_LENSES := sae-lens sae-lens-6.18
bench-harvest: $(VENV)/installed $(SAE_LENSES:%=$(VENV)-%/installed)
	$(BIN)/python benchmarks/harvest.py --sae-lens $(SAE_LENSES:%=$(VENV)-%/bin/python) \
		--write benchmarks/RESULTS.md

PEERS = nnsight transformer-lens pyvene

bench-peers: $(VENV)/installed $(PEERS:%=$(VENV)-%/installed)
	$(BIN)/python benchmarks/overhead.py --peers $(VENV)-nnsight/bin/python
	$(BIN)/python benchmarks/experiments.py --write benchmarks/RESULTS.md --peers \
		$(foreach peer,$(PEERS),$(subst -,_,$(peer))=$(VENV)-$(peer)/bin/python)

# What runs experiments and nothing else. What tests, checks and documentation take is added by the
# targets that need it.
# torch goes first: without a pin, whatever needs it would pull the newest build.
$(VENV)/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed: $(VENV)/runtime
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)-transformers4/installed: pyproject.toml constraints-transformers4.txt
	$(PYTHON) -m venv $(VENV)-transformers4
	$(VENV)-transformers4/bin/pip install -q --disable-pip-version-check \
		-c constraints-transformers4.txt torch
	$(VENV)-transformers4/bin/pip install -q --disable-pip-version-check \
		-c constraints-transformers4.txt -e ".[test]" torchao
	@touch $@

OTHERS := $(sort $(PEERS) $(ORACLES) $(SAE_LENSES))
BESIDE_captum := transformers
# These read folders of activations. A newer torch would be pulled for a torchvision that they use
# for nothing, and which fails beside this one.
BESIDE_sae-lens := -e .
BESIDE_eai-sparsify := -e .
BESIDE_dictionary-learning := -e . $(shell grep ^torch== constraints.txt)
WITHOUT_dictionary-learning := torchvision
# Its NumPy is older than what a newer pyarrow takes.
PACKAGES_sae-lens-6.18 := "sae-lens==6.18.*" "pyarrow<22" $(shell grep ^torch== constraints.txt)

$(OTHERS:%=$(VENV)-%/installed): $(VENV)-%/installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)-$*/bin/pip install -q --disable-pip-version-check \
		$(or $(PACKAGES_$*),$*) $(BESIDE_$*)
	$(if $(WITHOUT_$*),$(VENV)-$*/bin/pip uninstall -q -y $(WITHOUT_$*))
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-transformers4 $(OTHERS:%=$(VENV)-%)
