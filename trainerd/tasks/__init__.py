"""The built-in tasks: each is one model, its data, its loss, behind the same protocol as a user's own file."""
