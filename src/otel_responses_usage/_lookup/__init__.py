"""Usage that is asked for after a call: jobs, retries, the circuit breaker, threads."""
