"""The commands, from a checkout: `python run_optimized_training.py start|status|monitor|stop|...`. A door; the house is client/."""

import sys
from pathlib import Path

from client.main import main

if __name__ == "__main__":
    sys.exit(main(checkout=Path(__file__).resolve().parent))
