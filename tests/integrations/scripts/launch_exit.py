"""A script that fails: it exits with 3."""

import sys

sys.exit(3)
