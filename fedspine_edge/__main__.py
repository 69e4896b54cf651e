"""Run the command line with `python -m fedspine_edge`."""

import sys

from fedspine_edge.cli.main import main

sys.exit(main())
