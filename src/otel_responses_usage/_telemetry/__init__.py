"""Writes all spans and metrics. No other part of the package does."""
