"""Quantize a UNet2DModel along its sampling trajectory.

In order: `steps.read_steps` (the scheduler), `unet.layers_of` and `unet.layer_bits`, `weights.quantize_weight` or
`adaround.reconstruct`, `ranges.fit_quantizers` and `quantizers.attach_quantizers`, `trajectory.boundaries` and
`accuquant.calibrate`, `correctors.fit_corrections`; `trajectory.error_curves` measures. A network is called through
`quantizers.StepNetwork`; everything runs on the device of its weights.
"""
