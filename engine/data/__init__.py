"""What is trained on: recordings, latents, segments."""
