"""What things are: a request, a response, its usage, the outcome of a call. Standard library only."""
