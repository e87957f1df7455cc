"""Everything this package raises on purpose. All are `ValueError`s, so callers may catch just that."""


class ZSMergeError(ValueError):
    """Base of every error raised on purpose by zsmerge_compile."""


class ConfigError(ZSMergeError):
    """A ZSMergeConfig field, or its resolution for a model's layers, is not possible."""


class InputError(ZSMergeError):
    """A prompt, token, mask, row selection or saved cache cannot be processed; nothing was written to the cache."""


class UnsupportedModelError(ZSMergeError):
    """The model's class or one of its settings has no support; the message names which."""


class UnsupportedGraphError(ZSMergeError):
    """The traced graph holds something the passes do not understand; the message names the node and its source line."""


class UnsupportedMaskError(UnsupportedGraphError):
    """An attention mask is none of causal, sliding window and ALiBi."""


class CacheStateError(ZSMergeError):
    """A cache row is in no state to be used; `reset(rows)` makes it usable again."""


class BundleError(ZSMergeError):
    """An exported bundle is damaged, of another version or format, or names what it may not."""


class EquivalenceError(ZSMergeError):
    """A compiled model and what it must equal give different logits; the message has the smallest case found."""


class MissingBackendError(ZSMergeError):
    """A backend or an optional extra is not installed; the message names the command that installs it."""


def must(what: str, expected: object, got: object, hint: str = "") -> str:
    """The one form of message: `<what> must be <expected>, got <got>[; hint]`."""
    return f"{what} must be {expected}, got {got}" + (f"; {hint}" if hint else "")
