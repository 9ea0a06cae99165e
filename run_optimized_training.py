"""The commands, from a checkout: `python run_optimized_training.py start|status|monitor|stop|...`. A door; the house is client/."""

import sys

from launcher import quiet

if __name__ == "__main__":
    quiet.interrupts()
    from launcher.hand_over import hand_over

    checkout = hand_over(__file__)
    from client.main import main

    sys.exit(main(checkout=checkout))
