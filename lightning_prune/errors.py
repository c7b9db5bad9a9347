"""What can go wrong, by what the reader can do about it.

    PruneError
    ├── TraceError               the model could not be run or followed on the example input
    ├── UnmeetableBudget         no choice of units reaches the budget
    ├── NothingToPrune           no unit may go: everything is frozen, ignored or exempt
    ├── UnsafeCut                the proof of a cut failed; the model is as it was before
    ├── IncompatibleCheckpoint   the state belongs to another model
    ├── NonFiniteScore           NaN or infinity where a score was wanted
    ├── NoEvent                  the schedule has no event in this fit
    └── UnequalExport            what was exported computes something else than the model

A bad argument value is a ``ValueError``, a call at the wrong moment a ``RuntimeError``.
"""


class PruneError(Exception):
    """Base of every error that is about pruning itself."""


class TraceError(PruneError):
    """The model could not be run, or followed, on the example input."""


class UnmeetableBudget(PruneError):
    """No choice of units reaches the budget; the message says the smallest reachable value."""


class NothingToPrune(PruneError):
    """No unit of the model may go; the message says why, group by group."""


class UnsafeCut(PruneError):
    """The proof of a cut failed. The model is exactly as it was before."""


class IncompatibleCheckpoint(PruneError):
    """A state dict or plan belongs to another model."""


class NonFiniteScore(PruneError):
    """A loss, gradient or score is NaN or infinite where a decision has to be made."""


class NoEvent(PruneError):
    """The schedule has no event in this fit, so the method would do nothing."""


class UnequalExport(PruneError):
    """What was exported does not compute what the model does; it was not left behind."""
