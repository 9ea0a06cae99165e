"""Training in this terminal: `python optimized_train.py --epochs 5 --dataset-size 10000`. A door; the house is client/."""

import sys
from pathlib import Path

from launcher.hand_over import hand_over

if __name__ == "__main__":
    hand_over(__file__)
    from client.main import main

    sys.exit(main(["foreground", *sys.argv[1:]], checkout=Path(__file__).resolve().parent))
