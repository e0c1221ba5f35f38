"""Tools that measure and predict the communication of normalization."""

from distnorm.diagnostics.drift import stats
from distnorm.diagnostics.ledger import Ledger, Tally

__all__ = ["Ledger", "Tally", "stats"]
