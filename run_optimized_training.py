"""The commands, from a checkout: `python run_optimized_training.py start|status|monitor|stop|...`. A door; the house is client/."""

import sys
from pathlib import Path

from launcher.hand_over import hand_over

if __name__ == "__main__":
    hand_over(__file__)
    from client.main import main

    sys.exit(main(checkout=Path(__file__).resolve().parent))
