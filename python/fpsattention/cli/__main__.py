"""`python -m fpsattention.cli`: the command line where the console script is not on PATH."""

import sys

from .main import main

sys.exit(main())
