"""What a run will do: ``python -m fsdpsft.plan``, see ``fsdpsft/tools/plan.py``."""

import sys

from fsdpsft.tools.plan import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
