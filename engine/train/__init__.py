"""Training: one file a stage, its data and its loss."""
