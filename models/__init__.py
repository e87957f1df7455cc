"""Model families: what a trace cannot reveal about each supported architecture."""
