"""Prove what a training would train on: ``python -m fsdpsft.check``, see ``fsdpsft/tools/check.py``."""

import sys

from fsdpsft.tools.check import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
