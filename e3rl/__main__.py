"""``python -m e3rl``."""

import sys

from e3rl.cli import main

sys.exit(main())
