"""One command that proves and times the operations: python -m engine.kernels.benchmark."""
