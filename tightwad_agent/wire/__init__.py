"""Bytes between nodes: framing and typed messages. Pure."""
