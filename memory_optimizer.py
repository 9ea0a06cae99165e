"""This machine's memory: `python memory_optimizer.py profile|config|optimize|monitor`. A door; the house is client/."""

import sys

from launcher import quiet

if __name__ == "__main__":
    quiet.interrupts()
    from launcher.hand_over import hand_over

    checkout = hand_over(__file__)
    from client.main import main

    sys.exit(main(["memory", *sys.argv[1:]], checkout=checkout))
