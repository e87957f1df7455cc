"""The one table of tolerances: every test and every check uses these."""

from __future__ import annotations

OP_FP32 = 1e-5  # outputs of the cache ops in fp32, absolute and relative
LOGITS_FP32 = 1e-4  # model logits in fp32, as a share of their range (largest - smallest)
HALF_FACTOR = 2.0  # bf16, fp16 logits: at most this times what transformers' sdpa and eager attention differ by
HALF_FLOOR = 2.0  # ... or this many units in the last place of the largest logit, if that is more
DECISION = 1e-5  # two scores or products closer than this, relatively, may be ordered either way
DECISION_HALF = 0.25  # the same where scores come from bf16 or fp16 logits
