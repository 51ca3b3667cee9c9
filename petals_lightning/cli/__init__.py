"""The `petals-lightning` command."""
