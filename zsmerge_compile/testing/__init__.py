"""Proof for users and for our own tests: the list-based oracle, and `check_equivalence`."""
