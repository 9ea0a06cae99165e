"""Facts about this computer, and how to be polite on it. One file per system behind the same names. Never torch."""
