"""Settings of another trainer as ours: ``python -m fsdpsft.convert``, see ``fsdpsft/tools/convert.py``."""

import sys

from fsdpsft.tools.convert import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
