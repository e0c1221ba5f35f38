"""``python -m run_bare [-m] x.py args``: what distnorm.run does with a script, without importing torch."""

import importlib.util
import sys
from pathlib import Path

path = Path(__file__).parents[3] / "distnorm" / "integrations" / "script.py"
spec = importlib.util.spec_from_file_location("script", path)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
if sys.argv[1] == "-m":
    script.run_module(sys.argv[2], sys.argv[3:])
else:
    script.run_script(sys.argv[1], sys.argv[2:])
