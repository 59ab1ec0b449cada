# From a grid file to a report: corpus → one papermill job per run → analysis → report.
#
#   snakemake --cores all --config grid=quick          (what `make report` calls)
#
# A finished run is not run again; an added size runs alone. A changed parameter, source or text runs it anew.

import atexit
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, workflow.basedir)

from snakemake.io import IOFile
from snakemake.logging import logger

from ctxlm.analysis.runs import damaged_runs, grid_dtype, set_aside
from ctxlm.batch import FAILURE, GRID_LOCK, failures, is_executed, on_one_line
from ctxlm.config import NOTEBOOKS, ConfigError, code_hash, load_grid
from ctxlm.corpus import check_data
from ctxlm.embeddings import data_hash, load_embedding
from ctxlm.files import InUse, digest, parse_json, take
from ctxlm.results import outputs_dir

OUTPUTS = os.path.expanduser(os.environ.get("CTXLM_OUTPUTS") or "outputs")
GRID_FILE = str(config.get("grid", "quick") or "")  # YAML makes None of `grid=`
WORKS = not {"-n", "-np", "--dry-run", "--dryrun", "--unlock"}.intersection(sys.argv)  # Snakemake knows it later only
DATA_PARAMETERS = {"corpus", "embedding", "embed_dim", "val_samples", "development_samples", "test_samples", "max_sample_tokens"}

# What Snakemake says and nobody needs. Why a job failed it has said itself, unless it was killed.
NOISE = re.compile(
    r"Select jobs|Execute \d+ job|Cannot restore|Exiting because|WorkflowError:\s+At least one job|Complete log"
    r"|Restored previous version|RuleException:\s+CalledProcessError.*non-zero exit status \d+",
    re.DOTALL,
)
if "--verbose" not in sys.argv:
    logger.addFilter(lambda record: not NOISE.match(record.getMessage()))

if type(config.get("threads", 1)) is not int or config.get("threads", 1) < 1:  # True is an int, too
    sys.exit(f"threads = {config['threads']!r} is not possible: give the cores that a run gets, as threads=8")
if workflow.cores is not None and workflow.cores < 1:
    sys.exit(f"--cores {workflow.cores} is not possible: give one or more, as JOBS=2, or all")
if "{" in OUTPUTS or "}" in OUTPUTS:  # Snakemake would take them for wildcards
    sys.exit(f"CTXLM_OUTPUTS = {OUTPUTS!r} has braces in it: name another folder")
try:  # everything that can be said before any work starts is said here, in one sentence
    GRID = load_grid(GRID_FILE)
    if any(run.device.startswith("cuda") for run in GRID.runs.values()):
        from ctxlm.device import resolve_device

        for run in GRID.runs.values():
            resolve_device(run)
    DATA = {}
    if workflow.is_main_process:  # a cluster's jobs parse this file again, three times each: they read no text for it
        check_data(GRID.runs.values())
        for run in {(run.embedding, run.embed_dim): run for run in GRID.runs.values()}.values():
            if run.embedding not in ("ppmi", "random"):  # those that may be missing
                load_embedding(run)
        DATA = {(run.corpus, run.embedding): data_hash(run) for run in GRID.runs.values()}
        # A grid is one process's at a time, and free again once that has died: Snakemake's own lock, which a killed one
        # leaves behind, is not used (profiles/default).
        if WORKS and not config.get("finished"):
            if before := take(outputs_dir() / GRID.name / GRID_LOCK):
                print(f"{before}, ran grid {GRID.name} and was stopped: going on from what it left", flush=True)
            for damage in damaged_runs(GRID.name):  # before new runs are paid for, not after
                set_aside(damage)
                print(damage, flush=True)
    if any(run.dtype == "auto" for run in GRID.runs.values()):  # one type for all, wherever each of them runs
        ONE = {"dtype": grid_dtype(GRID.name, GRID.runs)}
        RUNS = {name: run.model_copy(update=ONE if run.dtype == "auto" else {}) for name, run in GRID.runs.items()}
    else:
        RUNS = GRID.runs
    PLANNED = len(RUNS)
    if config.get("finished"):  # what follows upon a failure: the report of what there is
        RUNS = {name: run for name, run in RUNS.items() if name not in failures(outputs_dir() / GRID.name, RUNS)}
except InUse as other:
    sys.exit(f"Grid {GRID.name} is being run by {other}: wait for it to end, or stop it")
except (ConfigError, OSError) as error:
    sys.exit(str(error))  # an exception would have the Snakefile's lines printed around the sentence

# What the code was when the command began, for all its jobs: one made with other code is not one of this grid.
os.environ.setdefault("CTXLM_CODE", json.dumps({run.model: code_hash(run.model) for run in RUNS.values()}))

HOME = f"{OUTPUTS}/{GRID.name}"
# What the analysis is made with beside its grid's runs, and what the report is.
PAGES = [Path("ctxlm/analysis/site.py"), *sorted(Path("ctxlm/analysis/templates").rglob("*.*"))]
BESIDES = [path for path in sorted(Path("ctxlm/analysis").glob("*.py")) if path not in PAGES]
BESIDES += ["ctxlm/results.py", "ctxlm/metrics.py"]


RUN_FILES = ["metrics.json", "history.csv", "val_by_sample.csv", "development_by_sample.csv", "test_by_sample.csv"]  # what the analysis reads


def visible_gpus() -> list[str]:
    """Indices of the GPUs this machine lends us; none without a driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        listed = [index.strip() for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [] if "-1" in listed else [index for index in listed if index]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return answer.stdout.split() if answer.returncode == 0 else []


GPUS = visible_gpus()
os.environ["CTXLM_GPUS"] = " ".join(GPUS)
# The cores are shared out among the runs, as whole runs side by side; with GPUs, one run to a GPU. A cluster's
# executor names no cores: `--config threads=8` then says how many a run gets.
CORES = workflow.cores or 1
SHARE = -(-CORES // len(GPUS)) if GPUS else CORES // len(RUNS)  # rounded up, so that no run lacks a GPU
THREADS = config.get("threads", max(1, SHARE))


def takes_a_gpu(run) -> bool:
    """Whether any GPU would do: an n-gram has no use for one, and a run may name its own, or none."""
    return run.model != "kneser-ney" and run.device in ("auto", "cuda")


def size(run) -> int:
    """Training tokens, about."""
    return run.train_tokens or 250 * run.train_samples


def wait_for_slurm() -> None:
    """Wait for runs of this grid that an earlier command has left in Slurm's queue, so that none is run twice."""
    mine = {f"{os.getcwd()}|rule_experiment_wildcards_{GRID.name}_{run}" for run in RUNS}  # a job's folder and comment
    for count in itertools.count():
        queue = subprocess.run(["squeue", "--me", "--noheader", "--format=%Z|%k"], capture_output=True, text=True)
        if queue.returncode:
            sys.exit(queue.stderr.strip())
        if not (left := len(mine.intersection(queue.stdout.splitlines()))):
            return
        if count == 0:
            print(f"Waiting for {left} runs of {GRID.name} that are in Slurm's queue already", file=sys.stderr)
        time.sleep(10)


if WORKS and workflow.is_main_process and workflow.nodes and shutil.which("squeue"):  # `nodes`: jobs go to a cluster
    wait_for_slurm()


# The corpora of the grid: usually one. Runs that read the same tokens through the same embedding share it.
CORPORA: dict[str, dict] = {}
CORPUS_OF: dict[str, str] = {}
for name, run in RUNS.items():
    values = run.model_dump(include=set(DATA_PARAMETERS))
    known = [corpus for corpus, others in CORPORA.items() if others == values]
    CORPUS_OF[name] = known[0] if known else f"corpus-{len(CORPORA) + 1}" if CORPORA else "corpus"
    CORPORA[CORPUS_OF[name]] = values


def largest(corpus: str) -> dict:
    """The largest training size asked of a corpus, in tokens if any run gives tokens, else in samples."""
    runs = [run for name, run in RUNS.items() if CORPUS_OF[name] == corpus]
    tokens = max((run.train_tokens or 0 for run in runs)) or None
    samples = None if tokens else max(run.train_samples for run in runs)
    return {"train_tokens": tokens, "train_samples": samples}


# By papermill, on {threads} threads; its output goes to a log, and what is worth saying to the terminal.
EXECUTE = (
    "python -m ctxlm.batch {params.notebook:q} {log.notebook:q} --done {output[0]:q} --values {params.values:q}"
    " --threads {threads}"
)


def unrecorded(wildcards) -> list:
    """No input. A result that is not the one of Snakemake's record is judged by what it says itself.

    A job that outlives its command makes such a one, since it is the command that writes the record.
    """
    run, files = RUNS[wildcards.run], [IOFile(f"{HOME}/{wildcards.run}/{file}") for file in RUN_FILES]
    metrics = Path(files[0])
    if workflow.is_main_process and metrics.exists():
        record = workflow.persistence.metadata(files[0])
        asked = run.model_dump(exclude={"device"}) | {"code_hash": code_hash(run.model)}
        asked["data_hash"] = DATA[run.corpus, run.embedding]
        if record is None or record.endtime != metrics.stat().st_mtime:
            try:
                found = dict(parse_json(metrics.read_bytes()))
            except (OSError, ValueError, TypeError):  # damaged: a dry run, which sets nothing aside, comes here
                found = {}
            if any(found.get(name) != value for name, value in asked.items()):
                workflow.dag.forcefiles.add(files[0])
            elif record:
                for file in files:
                    workflow.persistence.cleanup_metadata(file)
    return []


def not_whole(name: str, notebook: str = "") -> list:
    """No input. A file of the grid's that is cut, whose notebook was not run to its end, or whose page links to one that
    is gone, is made anew."""
    home = outputs_dir() / GRID.name
    try:
        text = (home / name).read_text(encoding="utf-8")
        links = re.findall(r'href="([^":#?]+\.html)"', text) if name.endswith(".html") else []
        texts = [text, *(((home / name).parent / unquote(link)).read_text(encoding="utf-8") for link in links)]
        whole = all(one.endswith(("\n", "}", "</html>")) for one in texts) and (not notebook or is_executed(home / notebook))
    except (OSError, ValueError):
        whole = False
    if workflow.is_main_process and (home / name).exists() and not whole:
        workflow.dag.forcefiles.add(IOFile(f"{HOME}/{name}"))
    return []


wildcard_constraints:
    grid=re.escape(GRID.name),  # a wildcard only so that Slurm's queue shows it
    run="|".join(map(re.escape, RUNS)),
    corpus="|".join(CORPORA),


localrules:
    all,
    corpus,  # read once, where the command is given: the runs find it in the cache
    analysis,
    report,


rule all:
    input:
        f"{HOME}/report/index.html",
        # named here too, so that what was deleted is made again
        f"{HOME}/estimates.csv",
        expand(f"{HOME}/{{run}}/{{file}}", run=RUNS, file=RUN_FILES),
        expand(f"{HOME}/{{corpus}}/corpus.json", corpus=CORPORA),


rule corpus:
    input:
        "notebooks/01_corpus.ipynb",
        "ctxlm/corpus.py",
        "ctxlm/embeddings.py",
        lambda wildcards: not_whole(f"{wildcards.corpus}/corpus.json", f"{wildcards.corpus}/corpus.ipynb"),
    output:
        f"{HOME}/{{corpus}}/corpus.json",
    log:
        notebook=f"{HOME}/{{corpus}}/corpus.ipynb",
        text=f"{HOME}/{{corpus}}/corpus.log",
    params:
        notebook="notebooks/01_corpus.ipynb",
        values=lambda wildcards: on_one_line(
            CORPORA[wildcards.corpus]
            | {
                "output_dir": f"{HOME}/{wildcards.corpus}",
            }
            | largest(wildcards.corpus)
        ),
        data=lambda wildcards: DATA.get((CORPORA[wildcards.corpus]["corpus"], CORPORA[wildcards.corpus]["embedding"])),
    threads: CORES
    # Before all runs, which find its caches then. It is no input of theirs: what a run takes from the corpus is among
    # the run's own parameters, and Snakemake does not look at the parameters of a job whose input is being made anew.
    priority: 10**9
    message:
        "Reading the corpus and its embeddings"
    shell:
        EXECUTE + " --name {wildcards.corpus}"


rule experiment:
    input:
        unrecorded,
    output:
        # an earlier result stays until a new one is whole
        [update(f"{OUTPUTS}/{{grid}}/{{run}}/{file}") for file in RUN_FILES],
    log:
        notebook=f"{OUTPUTS}/{{grid}}/{{run}}/experiment.ipynb",
        text=f"{OUTPUTS}/{{grid}}/{{run}}/experiment.log",
    params:
        values=lambda wildcards: on_one_line(
            RUNS[wildcards.run].for_notebook() | {"output_dir": f"{HOME}/{wildcards.run}"}
        ),
        # By name, not by value: another number of GPUs is no reason to run anything again.
        gpus=lambda wildcards: "$CTXLM_GPUS" if takes_a_gpu(RUNS[wildcards.run]) else "",
        notebook=lambda wildcards: NOTEBOOKS[RUNS[wildcards.run].model],
        code=lambda wildcards: code_hash(RUNS[wildcards.run].model),
        data=lambda wildcards: DATA.get((RUNS[wildcards.run].corpus, RUNS[wildcards.run].embedding)),
    threads: THREADS
    # The longest runs first, so that no core waits for a long last one.
    priority: lambda wildcards: RUNS[wildcards.run].train_tokens or RUNS[wildcards.run].train_samples
    # What a cluster's job asks for: some three times what was measured (docs/speed.md), and more when it is tried again.
    resources:
        mem_mb=lambda wildcards, attempt: attempt * (4000 + size(RUNS[wildcards.run]) // 250),
        runtime=lambda wildcards, attempt: attempt * (30 + size(RUNS[wildcards.run]) // 1000),
        gres=lambda wildcards: str(config.get("gres", "")) if takes_a_gpu(RUNS[wildcards.run]) else "",
    message:
        "Run {wildcards.run}"
    shell:
        EXECUTE + " --name {wildcards.run:q} --gpus {params.gpus} --planned {PLANNED}"


def last_words(failed: dict[str, str]) -> None:
    """What has no result, a line of cause each, where it is the last that is read."""
    home = outputs_dir() / GRID.name
    for folder, log in ((home, "04_scaling.log"), *((home / name, f"{name}/corpus.log") for name in CORPORA)):
        if (folder / FAILURE).exists():
            print(f"{log}: {(folder / FAILURE).read_text(encoding='utf-8', errors='replace').strip()}")
    if (home / "report" / "index.html").exists() and len(failed) < PLANNED:
        print(f"The report, of what there is: {HOME}/report/index.html")
    if failed:
        print(f"{len(failed)} of {PLANNED} runs have no result:")
        for name, why in failed.items():
            print(f"  {name}: {why} ({HOME}/{name}/experiment.log)")


onerror:
    # The report of what is finished, and at the very end what is not.
    failed = failures(outputs_dir() / GRID.name, RUNS)
    if not config.get("finished"):
        if failed and len(failed) < PLANNED:
            rest = ["--cores", "1", "--workflow-profile", "none", "--rerun-triggers", "mtime", "--until", "report"]
            rest += ["--forcerun", "report"]  # which says what is missing
            rest += ["--quiet", "all", "--nolock", "--rerun-incomplete", "--config", f"grid={GRID_FILE}", "finished=true"]
            subprocess.run([sys.executable, "-m", "snakemake", *rest])
        atexit.register(last_words, failed)


# No `update()` here: Snakemake would give an earlier result back after a failure, with a new time, and take it for
# the new one from then on. It is made of the runs, so that nothing is lost with it.
rule analysis:
    input:
        "notebooks/04_scaling.ipynb",
        BESIDES,
        lambda wildcards: not_whole("estimates.csv", "04_scaling.ipynb"),
        expand(f"{HOME}/{{run}}/{{file}}", run=RUNS, file=RUN_FILES),
    output:
        f"{HOME}/estimates.csv",
    log:
        notebook=f"{HOME}/04_scaling.ipynb",
        text=f"{HOME}/04_scaling.log",
    params:
        notebook="notebooks/04_scaling.ipynb",
        values=lambda wildcards: on_one_line({"grid": GRID_FILE, "output_dir": HOME}),
    message:
        "Analysing the grid"
    shell:
        EXECUTE + " --name analysis"


rule report:
    input:
        PAGES,
        lambda wildcards: not_whole("report/index.html"),
        f"{HOME}/estimates.csv",
        expand(f"{HOME}/{{corpus}}/corpus.json", corpus=CORPORA),
    output:
        f"{HOME}/report/index.html",
    params:
        # A changed title, or list of runs, is a new report. Only its digest: braces would be taken for wildcards.
        words=digest(GRID.title, GRID.description, *GRID.runs),
    message:
        "Writing the report"
    shell:
        "python -m ctxlm.analysis.site --grid {GRID_FILE:q} --outputs {OUTPUTS:q}"
