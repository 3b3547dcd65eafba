"""`python -m capstan`, as in `torchrun --nproc-per-node 2 -m capstan generate ...`."""

import sys

from capstan.cli import main

if __name__ == "__main__":
    sys.exit(main())
