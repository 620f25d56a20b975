"""Turns the answer to one call into facts.

An answer is the data that the server sends back: an event stream or one JSON document.
"""
