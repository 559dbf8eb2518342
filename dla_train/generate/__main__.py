"""`python -m dla_train.generate`: the program `dla-generate`."""

import sys

from dla_train.generate.command import main

if __name__ == "__main__":
    sys.exit(main())
