"""One agent per machine; together one OpenAI-compatible endpoint over pooled llama.cpp."""

__version__ = "0.1.0"
