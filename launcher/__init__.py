"""Installs and opens trainerd from a checkout. Standard library only; must not know anything about training."""
