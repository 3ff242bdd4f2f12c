"""One command that checks and times the operations: python -m engine.kernels.benchmark."""
