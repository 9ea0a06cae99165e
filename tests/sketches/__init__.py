"""Four tasks in about 30 lines each: the proof that the task protocol is enough. Must not know the engine beyond task and dropout."""
