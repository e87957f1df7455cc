"""Cache operators: `contracts` (schemas), `reference` (the specification), `decode` and `prefill` (what runs)."""
