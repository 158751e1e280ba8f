"""Every kind of activation quantizer: importing this module makes `from_description` know them all."""

from quantry.quantizers import fixed_point, grouped, logarithmic, product_bias, steps, twin  # noqa: F401
from quantry.quantizers.activation import KINDS, from_description

__all__ = ["KINDS", "from_description"]
