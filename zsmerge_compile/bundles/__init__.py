"""Ways out and in: a compiled model as a folder that runs without the model's code.

`export.py` writes a bundle and `load.py` reads one; `lower/standard.py` makes the two graphs free of our operators and
of their weights; `manifest.py` is the one file that says what the others are; one file per format beside them.
"""
