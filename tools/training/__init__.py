"""Trains the small LLaMA with long-range recall that the demo and the quality reports use."""
