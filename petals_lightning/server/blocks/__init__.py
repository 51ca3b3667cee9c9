"""Arithmetic: the blocks that a server holds, their autograd graphs and key-value caches. No I/O, no messages."""
