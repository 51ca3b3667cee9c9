"""What train.py does: recipes, the schema of their settings, and the run itself. Nothing below imports this."""
