"""Play in latents: window.py, the one forward path (rollout.py), and a game on a device (session.py)."""
