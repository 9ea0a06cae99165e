"""Pure arithmetic about memory: limits now, the estimate and the plan later. Never torch, never a GPU."""
