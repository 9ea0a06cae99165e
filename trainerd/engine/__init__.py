"""The training loop and all it stands on: precision, optimizers, checkpoints, recovery. The one package that needs torch."""
