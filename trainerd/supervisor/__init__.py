"""Keeps one trainer alive, is polite, tells the truth. Never torch, never a CUDA context."""
