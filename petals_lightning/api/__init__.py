"""An OpenAI-compatible endpoint for models in a swarm, and a page that shows the swarm. Needs the extra `api`."""
