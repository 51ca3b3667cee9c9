"""Petals' methods, translated at the edge: the same span, compute thread, caches, budgets and rules answer them."""

from petals_lightning.server.petals.methods import PetalsMethods

__all__ = ["PetalsMethods"]
