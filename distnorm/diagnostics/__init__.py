"""Tools that show what normalization does on the wire."""

from distnorm.diagnostics.drift import stats
from distnorm.diagnostics.ledger import Ledger, Tally

__all__ = ["Ledger", "Tally", "stats"]
