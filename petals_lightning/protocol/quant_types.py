"""How servers keep the weights of their blocks, by Petals' names. No import of torch: options need them."""

UNQUANTIZED = "none"
QUANT_TYPES = (UNQUANTIZED, "int8", "nf4")
"""As they are; in eight bits, with a scale for each output of a linear; in four, with one for each 64 weights."""
