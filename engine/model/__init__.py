"""The networks: what they compute, not how they are trained or played."""
