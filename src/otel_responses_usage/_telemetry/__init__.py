"""The only writer of spans and metrics."""
