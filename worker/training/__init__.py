"""Low-bit fixed-point training: weights, activations and gradients of a few bits.

Kim, Lee, Jeon, Moon, Ham, "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients",
ECCV 2024, arXiv:2407.12637. `forward`, `gradient` and `interval` are its quantizers, `layers` what carries them,
`integer` the same products on integers; `trainer`, `checkpoints` and `job` make a job of them.
"""
