"""Campaigns: thousands of kills, cuts and damages. Slow; how to run them is in docs/reliability.md."""
