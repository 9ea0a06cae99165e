"""The commands a person types, the monitor, and what starts the supervisor. Never torch."""
