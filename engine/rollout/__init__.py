"""Games in latents: the window, the one forward path (rollout.py), and a game on a device (session.py)."""
