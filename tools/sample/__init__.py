"""Makes the bundled sample, `petals_lightning/sample`: a grammar, what is written with it, the model's pretraining."""
