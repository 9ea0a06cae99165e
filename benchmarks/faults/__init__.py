"""How fast faults are found and mended, and how often one is seen that is none: `python -m benchmarks.faults`."""
