"""`python -m twotower` is the console script, so that `torchrun -m twotower` works."""

import sys

from twotower.cli import main

if __name__ == "__main__":
    sys.exit(main())
