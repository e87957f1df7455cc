"""Trains the small models with long-range recall that the demo and the quality reports use."""
