"""Training: the loop around a stage (loop.py), Ctrl-C and pauses (stop.py), what is saved and resumed
(resume.py), all stages one after the other (pipeline.py), and a file for each stage, listed in stages.py.
"""
