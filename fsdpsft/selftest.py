"""Prove the mathematics of training on this machine: ``python -m fsdpsft.selftest``."""

import sys

from fsdpsft.tools.selftest import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
