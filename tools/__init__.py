"""Commands for who works on this package: `python -m tools.NAME`."""
