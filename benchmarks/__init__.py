"""Measurements: each prints a ratio from one interleaved run beside its peer. Not part of the product."""
