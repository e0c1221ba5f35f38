"""Moving statistics: windows, stale mixes, warm-up and centralized weights."""
