"""A failing case as code that can be pasted into a session that holds `model`."""

from __future__ import annotations

from zsmerge_compile.testing.cases import FULL, Case
from zsmerge_compile.testing.compare import Mismatch
from zsmerge_compile.testing.subject import Subject

_FULL = """
call, ids, mask = spec_for(model).call, torch.empty({batch}, 0).long(), torch.empty({batch}, 0).long()
def reference(new, real):
    global ids, mask
    ids, mask = torch.cat([ids, new], 1), torch.cat([mask, real.long().view(len(new), -1)], 1)
    return call(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
"""
_SMALL = """
oracle = Oracle(model, {splits}, {windows}, merge={merge!r}, batch={batch}, kv_heads={kv_heads},
                call=spec_for(model).call)
def reference(new, real):
    return oracle.prefill(new, real, chunk={chunk}) if real.dim() == 2 else oracle.decode(new, real)
"""
_COMPARE = """
for new, real in calls:
    new, real = torch.tensor(new), torch.tensor(real)
    with torch.no_grad():
        want = reference(new, real)
    got = compiled.prefill(new, real) if real.dim() == 2 else compiled.decode(new, real)
    print((got - want).abs().amax(-1) / (want.amax(-1) - want.amin(-1)))
"""


def snippet(subject: Subject, mismatch: Mismatch) -> str:
    """Python text; the last line it prints shows the difference, as a share of the range, row by row."""
    case = mismatch.case
    lines = [
        "import torch",
        "import zsmerge_compile as zs",
        "from zsmerge_compile.models.registry import spec_for",
        *(["from zsmerge_compile.testing import Oracle"] if case.check != FULL else []),
        "",
        f"config = {_config(subject, case)}",
        f"compiled = zs.compile(model, config, batch_size={case.batch}, backend={subject.backend!r})",
        *([f"compiled.chunk = {case.chunk}"] if subject.policy is not None else []),
        "calls = [  # (tokens, attention_mask of a prompt or active rows of a step)",
        *(f"    ({call.ids.tolist()}, {call.mask.tolist()})," for call in mismatch.calls),
        "]",
    ]
    if case.check == FULL:
        reference = _FULL.format(batch=case.batch)
    else:
        reference = _SMALL.format(
            splits=[tuple(split) for split in subject.splits(case)],
            windows=subject.windows(case),
            merge=case.merge,
            batch=case.batch,
            kv_heads=subject.kv_heads(case),
            chunk=case.chunk,
        )
    return "\n".join(lines) + reference.rstrip("\n") + _COMPARE


def _config(subject: Subject, case: Case) -> str:
    """The call that makes it."""
    if subject.policy is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in subject.policy.describe().items())
        return f"zs.policy({subject.policy.name!r}, {given})"
    chunked = f", prefill='chunked', chunk={case.chunk}" if case.chunk is not None else ""
    return f"zs.ZSMergeConfig(budget={subject.config_of(case).budget}, merge={case.merge!r}{chunked})"
