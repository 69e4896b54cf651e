"""`python -m fedspine_edge` is the command line."""

import sys

from fedspine_edge.cli.main import main

sys.exit(main())
