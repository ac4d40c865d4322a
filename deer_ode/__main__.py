"""`python -m deer_ode`: fits a simulated two-body system; see `--help`."""

import sys

from ._demo import main


if __name__ == "__main__":
    sys.exit(main())
