"""The promises of trainerd, each held by a test that runs the real thing."""
