"""``python -m distnorm``: the ``distnorm`` command, for launchers such as torchrun, which start modules."""

import sys

from distnorm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
