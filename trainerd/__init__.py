"""trainerd: a background trainer for an ordinary laptop. Start it once, and it finishes."""
