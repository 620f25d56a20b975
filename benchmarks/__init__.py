"""What the instrumentation costs, measured so that anyone can repeat it: `scripts/bench`."""
