"""ctxlm: depth-versus-width studies of constant-memory language models.

To know the model, read `model`, `recurrence`, `phase1`, `phase2`, `trainer` and `loss`, in this order: an hour. What is
where, from what is asked for to what is written:

- `config`: every parameter of a run (`Experiment`), and grids of runs (`load_grid`);
- `corpus`, `embeddings`: text → tokens, split into training, validation, development and test → vectors;
- `model`: ContextBlock and TokenBlock; `recurrence`: contexts of a stream, many tokens at a time, certified;
  `loss`: cross-entropy against a large vocabulary;
- `phase1`, `phase2`: how each block is trained; `trainer`: the loop that trains every model's weights;
- `networks`, `ngrams`: what a user would otherwise pick;
- `metrics`, `memory`: perplexity, bits per byte, effective rank; how far back a context reaches;
- `run`: one run from settings to a written folder; `generate`: ask a finished one in words;
- `device`, `files`, `progress`: generators and types of products; paths, locks and the cache; a line of progress;
- `search`: hyper-parameters by Optuna; `batch`: what Snakemake runs;
- `analysis`: tables of finished runs, estimates with intervals, figures, the site, the playground.

To extend it: a network is a class in `networks.BODIES`, a name in `config.MODULES` and a file in `params/baselines/`; a
parameter is a field of `Experiment` and a line of `params/base.yaml` and of its notebook. `make test` names what is
missing.
"""

__version__ = "0.1.0"
