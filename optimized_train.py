"""Training in this terminal: `python optimized_train.py --epochs 5 --dataset-size 10000`. A door; the house is client/."""

import sys

from launcher import quiet

if __name__ == "__main__":
    quiet.interrupts()
    from launcher.hand_over import hand_over

    checkout = hand_over(__file__)
    from client.main import main

    sys.exit(main(["foreground", *sys.argv[1:]], checkout=checkout))
