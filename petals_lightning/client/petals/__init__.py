"""Servers that offer only Petals' methods, behind the interface of our own connection."""
