"""Tests of distnorm."""
