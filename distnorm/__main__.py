"""``python -m distnorm``: the ``distnorm`` command, in the form that launchers such as torchrun can start."""

import sys

from distnorm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
