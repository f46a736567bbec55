"""`python -m incidentd`."""

import sys

from incidentd.cli import main

if __name__ == "__main__":
    sys.exit(main())
