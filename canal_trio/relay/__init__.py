"""The relay core: bounded flows and hand-over on the spot between any two Trio streams. Knows no HTTP."""
