"""One call, from its request to the end of its span, and all open calls."""
