"""Pure arithmetic about memory: what a training allocates, what a machine makes of it, and the plan that fits."""
