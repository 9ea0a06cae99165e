"""The selftest: kills and damages a small real run again and again, and compares the result with an undisturbed one."""
