"""The OpenAI-compatible endpoint of every node."""
