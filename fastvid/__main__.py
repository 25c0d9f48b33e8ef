"""`python -m fastvid VERB ...` is `fastvid VERB ...`."""

import sys

from fastvid.cli import main

sys.exit(main())
