"""How far the memory estimate is from what torch allocates."""
