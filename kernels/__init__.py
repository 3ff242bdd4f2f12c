"""The engine's tensor operations, installed as engine.kernels; imports nothing of engine."""

from .dispatch import (
    choose,
    gate_residual_norm_modulate,
    qknorm_rope,
    qknorm_rope_write,
    use,
    window_attention,
)
from .reference import masked_attention, modulated_norm, rotate

__all__ = [
    "choose",
    "gate_residual_norm_modulate",
    "masked_attention",
    "modulated_norm",
    "qknorm_rope",
    "qknorm_rope_write",
    "rotate",
    "use",
    "window_attention",
]
