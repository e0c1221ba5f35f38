"""Queries of torch: its version, and the dispatch modes and transforms that a call runs under."""
