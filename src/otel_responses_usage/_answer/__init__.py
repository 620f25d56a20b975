"""An answer, as bytes or as events, read into facts."""
