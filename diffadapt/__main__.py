"""`python -m diffadapt` is the same as `diffadapt`."""

import sys

from diffadapt.cli import main

sys.exit(main())
