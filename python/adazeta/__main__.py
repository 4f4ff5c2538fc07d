"""``python -m adazeta``."""

import sys

from adazeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
