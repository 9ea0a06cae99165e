"""Tests that only a Windows Python can run: natively on Windows, elsewhere under Wine (tests/test_windows_tier.py runs them)."""
