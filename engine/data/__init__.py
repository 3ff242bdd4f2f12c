"""What is trained on: recordings (recording.py; their format: schema.py), who plays them (policies.py,
collection.py), and what becomes of them (latents.py, segments.py, state_logs.py).
"""
