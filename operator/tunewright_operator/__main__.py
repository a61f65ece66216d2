"""`python -m tunewright_operator`."""

from __future__ import annotations

import sys

from tunewright_operator.main import main

if __name__ == "__main__":
    sys.exit(main())
