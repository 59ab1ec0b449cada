"""ctxlm: depth-versus-width studies of constant-memory language models."""

__version__ = "0.1.0"
