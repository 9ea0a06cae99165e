"""`python -m trainerd.engine --home H --run R [--before-step N]`: the trainer. Must not do anything when imported: spawned
loader workers import it under another name."""

from trainerd.engine.process import main

if __name__ == "__main__":
    main()
