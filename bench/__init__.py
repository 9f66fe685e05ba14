"""Measurements of kernels and method: raw results as JSON lines in ``results/``, documents made from them."""
