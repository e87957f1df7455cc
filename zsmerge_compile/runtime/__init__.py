"""Running a compiled program: prompts and tokens in, logits out."""
