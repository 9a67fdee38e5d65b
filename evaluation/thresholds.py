"""What must hold for a synthetic set to leave the house: declared thresholds, each beside what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """The declared thresholds of a release.

    Where chance enters, the limit is for the end of the 95 % interval that speaks for the set: what is not measured to
    be too much passes, and what cannot be measured does not.

    Args:
        false_alarm_rate: share of the slices of held-out patients that would be suspicious.
        max_removed: largest share of suspicious slices that a filter may cure; a set of more than that is refused.
        max_retest: share of the slices that are kept, which the other detector may find suspicious; its interval must
            reach down to the false-alarm rate as well.
        min_copies_found: smallest share of planted exact copies, and of mirrored ones for the filter, that each
            detector finds.
        max_membership_auc: largest area under the curve of any membership attack; the lower end of its interval counts.
        min_held_out_patients: with fewer, nothing is established.
    """

    false_alarm_rate: float = 0.01
    max_removed: float = 0.05
    max_retest: float = 0.05
    min_copies_found: float = 0.95
    max_membership_auc: float = 0.6
    min_held_out_patients: int = 5

    def __post_init__(self) -> None:
        shares = ("false_alarm_rate", "max_removed", "max_retest", "min_copies_found", "max_membership_auc")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"thresholds.{name}={getattr(self, name):g}: expected a number from 0 to 1.")


@dataclass(frozen=True)
class Criterion:
    """One threshold and what was measured.

    Attributes:
        name: in words.
        measured: the number.
        limit: what it is compared with.
        holds: whether it passes; False where nothing could be measured.
        text: both in words.
    """

    name: str
    measured: float
    limit: float
    holds: bool
    text: str


def at_most(name: str, measured: float, limit: float, text: str) -> Criterion:
    """Make a criterion that a number must not exceed; NaN exceeds everything."""
    return Criterion(name, measured, limit, not math.isnan(measured) and measured <= limit, text)


def at_least(name: str, measured: float, limit: float, text: str) -> Criterion:
    """Make a criterion that a number must reach; NaN never does."""
    return Criterion(name, measured, limit, not math.isnan(measured) and measured >= limit, text)
