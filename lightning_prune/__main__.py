"""``python -m lightning_prune`` is ``lightning-prune``."""

import sys

from lightning_prune.commands import main

if __name__ == "__main__":
    sys.exit(main())
