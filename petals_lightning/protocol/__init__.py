"""What peers send each other: names, records, messages, tensors. Data only, no I/O.

Letters in shapes, here and in `petals_lightning.server`:

- B samples of a batch, S tokens of a sample, H hidden size
- P virtual tokens, which are the positions of the prefix
- N positions that are selected from the B·S of a batch
- n blocks that a request runs; in a session step: new positions
"""
