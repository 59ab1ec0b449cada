# `make` alone prints the targets. PYTHON= chooses the interpreter, GRID= the grid, SEARCH= the search, JOBS= how many
# cores to use, PROFILE= a cluster and GRES= what each of its jobs asks for, LAB= JupyterLab's own options; TOP=, K=, FROM=
# and SEED= stand beside the targets that read them.
PYTHON ?= python3
GRID ?= quick
SEARCH ?= lstm
JOBS ?= all
K ?= 12
VENV := .venv
BIN := $(VENV)/bin
STRIP := --keep-id --extra-keys metadata.language_info
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A virtual environment of its own: neither the user's site-packages nor another PYTHONPATH reach into it.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH
.DEFAULT_GOAL := help
.PHONY: help env report status results search reproduce site benchmark gpu test lab lint docs clean

help:  ## print the targets
	@echo "make TARGET [GRID=quick] [SEARCH=lstm] [PYTHON=python3] [JOBS=all]"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Of several that want it, one makes it and the others wait: a lock in a subprocess, which any death lets go of.
ALONE := @$(PYTHON) -c 'import fcntl, subprocess, sys; lock = open(".venv.lock", "w"); \
  fcntl.flock(lock, fcntl.LOCK_EX); sys.exit(subprocess.call(sys.argv[1:]))' $(MAKE) --no-print-directory

$(VENV)/.ready: pyproject.toml
	$(ALONE) $(VENV)/.made && touch $@

# What only tests and style need, so that the first report need not wait for it.
$(VENV)/.tested: $(VENV)/.ready
	$(ALONE) $(VENV)/.made-for-tests && touch $@

$(VENV)/.made-for-tests: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("ctxlm needs Python 3.11 or newer, but PYTHON is " + sys.version.split()[0] + ": name a newer one, as in make PYTHON=python3.12 report") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@# The kernel by its own name, for a Jupyter that lives elsewhere: `jupyter kernelspec list` shows it.
	@$(BIN)/python -m ipykernel install --prefix $(VENV) --name ctxlm --display-name ctxlm >/dev/null
	@# JupyterLab shows Markdown as a page, and asks no other host for news.
	@mkdir -p $(VENV)/share/jupyter/lab/settings && cp profiles/jupyterlab.json $(VENV)/share/jupyter/lab/settings/overrides.json
	@# Executed notebooks become HTML as in the report, by `jupyter nbconvert --to html` and JupyterLab's File > Export.
	@printf '{"HTMLExporter": {"template_name": "ctxlm"}, "TemplateExporter": {"extra_template_basedirs": ["%s"]}}\n' \
	  '$(CURDIR)/ctxlm/analysis/templates' >$(VENV)/etc/jupyter/jupyter_config.json
	@# Notebooks are stripped of their outputs as they are committed (.gitattributes names the filter).
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
	  git config filter.nbstripout.clean '"$(CURDIR)/$(BIN)/python" -m nbstripout $(STRIP)'; \
	  git config filter.nbstripout.smudge cat; fi
	@touch $@

env: $(VENV)/.tested  ## set up the virtual environment .venv

report: $(VENV)/.ready  ## run a grid and write outputs/<grid>/report/index.html (GRID=study: the study at full size)
	$(if $(PROFILE),$(if $(wildcard profiles/$(PROFILE)/.),,$(error PROFILE=$(PROFILE): there is no profiles/$(PROFILE))))
	@# What each run says itself is enough, but for what a cluster says. The report is of what there is.
	@anew=$$($(BIN)/python -m ctxlm.batch --check '$(GRID)') || exit 1; eval "set -- $$anew"; \
	  $(BIN)/snakemake $(if $(PROFILE),--profile profiles/$(PROFILE),--cores $(JOBS)) \
	  --quiet $(if $(PROFILE),progress host,all) --config 'grid=$(GRID)' $(addprefix gres=,$(GRES)) $${1:+--forcerun "$$@"}; \
	  code=$$?; $(BIN)/python -m ctxlm.analysis.site --grid '$(GRID)' && exit $$code

status: $(VENV)/.ready  ## print how far a grid is, also while it runs
	@$(BIN)/python -m ctxlm.batch --status '$(GRID)'

results: $(VENV)/.ready  ## publish a grid's finished runs as tables in data/results/<grid>
	@$(BIN)/python -m ctxlm.analysis.runs '$(GRID)'

search: $(VENV)/.ready  ## search hyper-parameters: params/search/$SEARCH.yaml, into data/search (TOP=3: its best at full size)
	@$(BIN)/python -m ctxlm.search params/search/$(SEARCH).yaml $(addprefix --top ,$(TOP)) \
	  $(addprefix --jobs ,$(filter-out all,$(JOBS)))

reproduce: $(VENV)/.ready  ## run K=12 published runs again, drawn at random, and compare (FROM=sites: of that grid alone)
	@$(BIN)/python -m ctxlm.analysis.reproduce $(K) $(addprefix --grid ,$(FROM)) $(addprefix --seed ,$(SEED)) \
	  $(addprefix --jobs ,$(filter-out all,$(JOBS)))

site: $(VENV)/.ready  ## write outputs/site/index.html: the findings and all committed runs, without training
	@$(BIN)/python -m ctxlm.analysis.site --all

benchmark: $(VENV)/.ready  ## measure speed and memory up to a million tokens (outputs/benchmark, up to an hour)
	@mkdir -p outputs/benchmark
	$(BIN)/papermill --log-output --no-progress-bar --cwd . -k python3 \
	  notebooks/10_benchmark.ipynb outputs/benchmark/benchmark.ipynb -f params/benchmark.yaml
	$(BIN)/jupyter nbconvert --to html outputs/benchmark/benchmark.ipynb

gpu: $(VENV)/.tested  ## device tests, benchmark and the study's runs, on a GPU
	$(BIN)/python -m pytest -q -m gpu tests/test_gpu.py
	@$(MAKE) --no-print-directory benchmark
	@$(MAKE) --no-print-directory report GRID=study

test: $(VENV)/.tested  ## check the code's style and run the tests, side by side on all cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses $(if $(filter all,$(JOBS)),auto,$(JOBS)) --dist loadfile --no-loadscope-reorder

lab: $(VENV)/.ready  ## open JupyterLab on its first page, notebooks/README.md
	$(BIN)/jupyter lab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks/README.md \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

lint: $(VENV)/.tested  ## tidy the code and strip the notebooks before a commit
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb

docs: $(VENV)/.ready  ## write docs/parameters.md from ctxlm/config.py, and the index's figures from the built site
	$(BIN)/python -m ctxlm.config
	@cp outputs/site/*.png docs/images/ 2> /dev/null || true

clean:  ## remove the environment and the caches; results in outputs stay
	@# .snakemake stays: it knows what the results were made with.
	rm -rf $(VENV) data/cache
