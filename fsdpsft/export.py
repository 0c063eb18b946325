"""Any checkpoint to a Hugging Face model: ``python -m fsdpsft.export``, see ``fsdpsft/tools/export.py``."""

import sys

from fsdpsft.tools.export import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
