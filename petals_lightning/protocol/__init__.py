"""What peers say to each other: names, records, messages, tensors. Data only, no I/O."""
