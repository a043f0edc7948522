"""`python -m ownlm` is the command line."""

import sys

from ownlm.cli import main

sys.exit(main())
