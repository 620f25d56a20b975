"""Loopback stand-ins for the two services of the examples: the Responses API, and an OTLP receiver."""
