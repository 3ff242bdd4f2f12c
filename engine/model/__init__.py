"""The networks: what they compute, not how they are trained or played.

condition.py turns keys and state into a frame's condition token; kv_cache.py holds the ring and the sink;
noise.py has the noise, and the noise levels at the start of a game and in training.
"""
