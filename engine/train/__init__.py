"""Training: the loop around a stage, what it saves and resumes, and all stages one after the other."""
