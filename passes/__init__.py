"""Graph passes: each file rewrites the traced model in one way; `pipeline` holds their order."""
