# Everything here installs what it needs into VENV first, once, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
# cuda13 or tpu: the jax that drives the accelerator, for example `make demo ACCELERATOR=cuda13`. Empty: the CPU.
ACCELERATOR ?=
# Options for pytest, for example `make test PYTEST_ARGS="-k ssd -x"`.
PYTEST_ARGS ?=
# Options for train.py. --resume goes on with the run that is there.
TRAIN_ARGS ?= --resume

PRESET := digits-vqa
RUN := runs/$(PRESET)

bin := $(VENV)/bin
# Tests of a file share what was compiled for it, so they stay in one process.
pytest := $(bin)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
stamps := $(VENV)/.installed
comma := ,
suffix := $(addprefix -,$(ACCELERATOR))

.DEFAULT_GOAL := help
ifneq ($(filter-out cuda13 tpu,$(ACCELERATOR)),)
$(error ACCELERATOR: got $(ACCELERATOR), expected cuda13, tpu or nothing)
endif

.NOTPARALLEL:
.PHONY: help demo test test-full test-gpu lint docs clean always

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Options: PYTHON=$(PYTHON) VENV=$(VENV) ACCELERATOR=$(or $(ACCELERATOR),cpu|cuda13|tpu) PYTEST_ARGS= TRAIN_ARGS="

demo: $(stamps)/demo$(suffix) ## train a small ML-Mamba on handwritten digits, then ask it about a picture
	@$(bin)/python train.py $(PRESET) $(TRAIN_ARGS)
	@echo
	@echo "$(RUN)/example.png: $$(cat $(RUN)/example.txt)"
	@$(bin)/python -m ml_mamba_jax.chat $(RUN) --image $(RUN)/example.png --prompt "$$(cat $(RUN)/example.txt)"
	@echo
	@echo "Look next at $(RUN)/samples.png, $(RUN)/loss.png and $(RUN)/eval.json. Ask it more:"
	@echo "  $(bin)/python -m ml_mamba_jax.chat $(RUN) --image $(RUN)/example.png"

test: $(stamps)/test$(suffix) ## run the tests
	@$(pytest) $(PYTEST_ARGS)

test-full: $(stamps)/test$(suffix) ## run the tests that take minutes too
	@$(pytest) -m "full or not full" $(PYTEST_ARGS)

test-gpu: $(stamps)/test$(suffix) ## run the tests that need a CUDA device (with ACCELERATOR=cuda13)
	@$(bin)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(stamps)/lint$(suffix) ## check style and format
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

docs: $(stamps)/docs$(suffix) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean: ## remove the environment and everything that was built or cached; runs/ and data/ stay
	@test ! -e $(VENV) || test -d $(stamps) || { echo "error: got VENV=$(VENV), which make did not fill: remove it yourself" >&2; exit 1; }
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .jax_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra. An environment that an interrupted install left behind is started afresh: pip cannot repair it.
$(stamps)/%: pyproject.toml constraints.txt $(if $(shell test -x $(bin)/python && echo found),,always)
	$(need_python)
	@test ! -e $(stamps)/unfinished && $(bin)/python -c "$(is_new)" 2>/dev/null || { $(start_afresh); }
	@mkdir -p $(stamps) && touch $(stamps)/unfinished
	@echo "installing .[$(subst -,$(comma),$*)] into $(VENV); the first time takes a minute or two"
	@$(PYTHON) -m pip --python $(bin)/python install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[$(subst -,$(comma),$*)]"
	@rm $(stamps)/unfinished && touch $@

is_new := import sys; sys.exit(sys.version_info < (3, 11))

define need_python
@$(PYTHON) -c "$(is_new)" 2>/dev/null || { echo "error: got $(PYTHON) = $$($(PYTHON) --version 2>&1 || true)," \
	"expected Python 3.11 or newer: run make with PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -m pip install --help 2>/dev/null | grep -q -e "--python " || { echo "error: got $(PYTHON) without pip 22.3 or newer:" \
	"install it (Debian: apt-get install python3-pip) or run make with another PYTHON" >&2; exit 1; }
endef

# --without-pip: Debian's python3 has no ensurepip. A folder named by VENV is only ever cleared if it is an environment.
define start_afresh
if [ "$(VENV)" != .venv ] && [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then \
	echo "error: got VENV=$(VENV), which is no virtual environment: remove it or name another" >&2; exit 1; fi; \
$(PYTHON) -m venv --clear --without-pip $(VENV)
endef
