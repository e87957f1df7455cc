"""What compression costs on trained weights: one table of methods by budgets, and the ablations behind the defaults."""
