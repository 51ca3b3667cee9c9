"""The parts of train.py: recipes, the schema of settings, and the run itself."""
