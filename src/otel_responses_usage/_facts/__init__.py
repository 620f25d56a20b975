"""Data types for a request, a response, its usage and the outcome of a call. Standard library only."""
