"""The wire of Petals 2.x, which both of its sides share: names of methods, tensors, metadata, calls. Data only."""
