"""Training: the loop around a stage (loop.py), signals and pauses (stop.py), saved states (resume.py), all
stages in turn (pipeline.py), and a file for each stage, listed in stages.py.
"""
