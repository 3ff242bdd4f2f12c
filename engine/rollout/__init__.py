"""Play in latents: the rolling window, the one forward path, sessions on a device."""
