"""`python -m squall` is the command `squall`."""

import sys

from squall.cli import main

if __name__ == "__main__":
    sys.exit(main())
