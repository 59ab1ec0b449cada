# From a grid file to its runs: the corpora, then one papermill job a run. `make report` calls it, and writes the report
# after it, of what there is:
#
#   snakemake --cores all --config grid=quick
#
# A finished run is not run again, and an added size runs alone. What a run depends on stands among its rule's `params`:
# a changed parameter, source or text runs it anew.

import os
import re
import sys

sys.path.insert(0, workflow.basedir)

from ctxlm.batch import corpora, data_of, home_of, on_one_line, visible_gpus
from ctxlm.config import DATA_PARAMETERS, NOTEBOOKS, ConfigError, code_hash, load_grid

ASKED = str(config.get("grid", "quick"))
try:
    GRID = load_grid(ASKED)
    RUNS = GRID.runs
    for run in RUNS.values():
        data_of(run)
except (ConfigError, OSError) as error:
    sys.exit(str(error))  # an exception would have this file's lines printed around the sentence

HOME = home_of(GRID.name)

CORPORA = corpora(RUNS.values())

# Cores are shared out among the runs, as whole runs side by side; with GPUs, at most one run to a GPU.
CORES = workflow.cores or 1
os.environ["CTXLM_GRID"] = ASKED  # for the lines that jobs print: in a rule it would run all anew
TRAINED = any(run.device != "cpu" and run.model != "kneser-ney" for run in RUNS.values())
GPUS = len(visible_gpus()) if TRAINED else 0
THREADS = max(1, -(-CORES // GPUS) if GPUS else CORES // len(RUNS))

# Its output goes to a log beside it, and what is worth a line to the terminal.
EXECUTE = (
    "python -m ctxlm.batch {params.notebook:q} {log.notebook:q} --done {output:q} --values {params.values:q}"
    " --threads {threads}"
)


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    corpus="|".join(CORPORA),


localrules:
    all,
    corpus,  # read once, where the command is given: the runs find it in the cache


rule all:
    input:
        expand(f"{HOME}/{{corpus}}/corpus.json", corpus=CORPORA),
        expand(f"{HOME}/{{run}}/metrics.json", run=RUNS),


rule corpus:
    input:
        "notebooks/01_corpus.ipynb",
    output:
        update(f"{HOME}/{{corpus}}/corpus.json"),  # which another command may be waiting for
    log:
        notebook=f"{HOME}/{{corpus}}/corpus.ipynb",
    params:
        notebook="notebooks/01_corpus.ipynb",
        values=lambda wildcards: on_one_line(
            CORPORA[wildcards.corpus].model_dump(include=DATA_PARAMETERS | {"train_tokens", "data_seed", "held_out_tokens"})
            | {"output_dir": f"{HOME}/{wildcards.corpus}"}
        ),
        data=lambda wildcards: data_of(CORPORA[wildcards.corpus]),
    threads: CORES
    # Before all runs, which find its caches then. It is no input of theirs: of what a run depends on, all is in `params`.
    priority: 10**9
    shell:
        EXECUTE


rule experiment:
    output:
        update(f"{HOME}/{{run}}/metrics.json"),  # an earlier result stays until a new one is whole
    log:
        notebook=f"{HOME}/{{run}}/experiment.ipynb",
    params:
        notebook=lambda wildcards: NOTEBOOKS[RUNS[wildcards.run].model],
        values=lambda wildcards: on_one_line(
            RUNS[wildcards.run].for_notebook() | {"output_dir": f"{HOME}/{wildcards.run}"}
        ),
        code=lambda wildcards: code_hash(RUNS[wildcards.run].model),
        data=lambda wildcards: data_of(RUNS[wildcards.run]),
    threads: THREADS
    # The longest runs first, so that no core waits for a long last one.
    priority: lambda wildcards: RUNS[wildcards.run].train_tokens
    # What a cluster's job asks for: some three times what was measured (docs/speed.md), and more when it is tried again.
    resources:
        mem_mb=lambda wildcards, attempt: attempt * (4000 + RUNS[wildcards.run].train_tokens // 250),
        runtime=lambda wildcards, attempt: attempt * (30 + RUNS[wildcards.run].train_tokens // 1000),
        gres=config.get("gres", ""),
    shell:
        EXECUTE
