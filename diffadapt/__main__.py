"""`python -m diffadapt` is the same as `diffadapt`."""

import sys

from diffadapt.cli.main import main

sys.exit(main())
