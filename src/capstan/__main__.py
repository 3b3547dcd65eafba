"""`python -m capstan`: the command line for launchers that start modules, such as torchrun."""

import sys

from capstan.cli import main

if __name__ == "__main__":
    sys.exit(main())
