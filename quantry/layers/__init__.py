"""What a quantized network runs."""
