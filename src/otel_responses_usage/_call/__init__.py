"""One call, from its request to the end of its span; and the calls that are open."""
