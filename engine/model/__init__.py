"""The networks: what they compute, not how they are trained or played.

Keys and state become a frame's condition token in condition.py; the ring and the sink are in kv_cache.py;
noise.py has the noise and the ladder's levels as a game begins and as training shows them.
"""
