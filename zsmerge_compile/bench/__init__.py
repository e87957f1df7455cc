"""Measurements: decode steps, prompts and compile times, ours beside transformers' and beside plain attention.

`tools/bench` and `zsmerge-compile bench` are one command (`command`). In the order the data meets them: `presets` says
what to measure as groups of `Row`s; `session` builds each row's `Step` on a model of a named `Shape` and times a
group's steps in turn; every row becomes a `Record` in one JSON file; `ratios` and `report` read only those records.
"""
