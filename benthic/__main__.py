"""`python -m benthic` is `benthic`."""

import sys

from benthic.cli import main

sys.exit(main())
