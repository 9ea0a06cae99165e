"""Prints in which environment it runs, for a test that started it as a module."""

import json
import sys

print(json.dumps([sys.prefix, sys.executable]))
