"""Throughput of the engine beside its peers, on the same batches and against what they do by default."""
