"""Membership inference: can one tell from a synthetic set which patients its generator was trained on?

The attacker has a score of any slice, for instance its distance to the nearest synthetic one, or the loss of a
diffusion model on it, both negated: the larger, the more likely a training slice. The patients who were held out show
how often the attacker is wrong (Carlini et al. 2022, "Membership inference attacks from first principles", IEEE S&P,
arXiv 2112.03570, section III: true-positive rate at a low false-positive rate, as an average hides the few who are
exposed).

The patient is the unit, in scores, counts and intervals. Blind to every other attack: a score that does not separate
the patients proves that this score does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from metrics.statistics import MIN_PATIENTS, Interval

Floats = npt.NDArray[np.float64]
Rule = Literal["max", "mean"]


@dataclass(frozen=True)
class MembershipInference:
    """How well a score tells training from held-out patients.

    `auc`: probability that a training patient scores higher than a held-out one, ties half; 0.5 is chance. `tpr`:
    share of training patients who reach `threshold`, the lowest that at most the stated share of held-out patients
    reach; `fpr` is the share of these who do. Of fewer than 1 / share held-out patients none may.
    """

    auc: Interval
    tpr: Interval
    fpr: float
    threshold: float


@dataclass(frozen=True)
class ExtractableShare:
    """Upper confidence limit of the share of training patients that can be told by a score.

    `flagged` of `n` training patients, and `false_alarms` of `n_heldout` held-out ones, reach `threshold`.
    """

    upper: float
    flagged: int
    n: int
    false_alarms: int
    n_heldout: int
    threshold: float


def patient_scores(scores: npt.ArrayLike, patients: npt.ArrayLike, rule: Rule) -> pd.Series:
    """Combine the scores of slices into one per patient.

    "max" is the attack that needs one reproduced slice; it grows with the number of slices, so training and held-out
    patients must have about as many. "mean" finds what is reproduced a little everywhere.

    Args:
        scores: (n,), NaN dropped.
        patients: (n,), the patient of each.
        rule: "max" or "mean".

    Returns:
        The score of each patient in the order of their names; NaN where all slices are.

    Raises:
        ValueError: If there is not one patient per score.
    """
    values, names = np.asarray(scores, np.float64), np.asarray(patients)
    if values.shape != names.shape or values.ndim != 1:
        raise ValueError(f"Expected one patient per score, but got shapes {values.shape} and {names.shape}.")
    by_patient = pd.Series(values).groupby(names)
    found: pd.Series = by_patient.max() if rule == "max" else by_patient.mean()
    return found


def roc_curve(members: npt.ArrayLike, heldout: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """False-positive and true-positive rate at every threshold, from none flagged to all.

    Args:
        members: (n,), scores of training patients.
        heldout: (m,), scores of held-out patients.

    Returns:
        Rates and thresholds (t,), the first of which is inf; patients are flagged who reach the threshold.
    """
    a, b = np.sort(np.asarray(members, np.float64)), np.sort(np.asarray(heldout, np.float64))
    thresholds = np.append(np.inf, np.unique(np.concatenate([a, b]))[::-1])
    tpr, fpr = ((x.size - np.searchsorted(x, thresholds)) / x.size for x in (a, b))
    return fpr, tpr, thresholds


def membership_inference(
    members: npt.ArrayLike,
    heldout: npt.ArrayLike,
    *,
    false_positive_rate: float = 0.01,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> MembershipInference:
    """Measure how well a score tells training from held-out patients, with percentile bootstrap intervals.

    Training and held-out patients are resampled apart. Where the rate allows hardly any held-out patient, the
    true-positive rate is too high by a little and its interval too short (in simulations it covers 8 of 10 times for 60
    patients of either kind, as often as it says for 200): :func:`extractable_share` holds there too.

    Args:
        members: (n,), one score per training patient; NaN dropped and counted.
        heldout: (m,), one score per held-out patient; NaN dropped and counted.
        false_positive_rate: largest share of held-out patients that may be flagged.
        n_resamples: number of bootstrap samples.
        seed: of numpy's `default_rng`.
        confidence: coverage of the intervals.

    Returns:
        Area under the curve and true-positive rate; the ends of the intervals are NaN below `MIN_PATIENTS` of a kind.

    Raises:
        ValueError: If there is no score of training or of held-out patients.
    """
    a, b, dropped = _valid(members, heldout)
    fpr, tpr, thresholds = roc_curve(a, b)
    chosen = _last_allowed(fpr, false_positive_rate)
    estimate = float(np.trapezoid(tpr, fpr)), float(tpr[chosen])
    low = high = np.full(2, np.nan)
    if min(a.size, b.size) >= MIN_PATIENTS:
        random = np.random.default_rng(seed)
        resampled = np.empty((n_resamples, 2))
        for i in range(n_resamples):
            x, y, _ = roc_curve(random.choice(a, a.size), random.choice(b, b.size))
            resampled[i] = np.trapezoid(y, x), y[_last_allowed(x, false_positive_rate)]
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    auc, rate = (Interval(estimate[i], float(low[i]), float(high[i]), a.size + b.size, dropped) for i in range(2))
    return MembershipInference(auc, rate, float(fpr[chosen]), float(thresholds[chosen]))


def extractable_share(
    members: npt.ArrayLike, heldout: npt.ArrayLike, *, false_positive_rate: float = 0.01, confidence: float = 0.95
) -> ExtractableShare:
    """Bound the share of training patients that a threshold on the score finds at a false-positive rate.

    The threshold that has this rate among all people is not known, only m of them. So it is put so low, at the r-th
    largest held-out score, that its rate is the stated one or more, with confidence: the rate of that threshold is
    distributed as Beta(r, m - r + 1) whatever the law of the scores. The share of training patients who reach it has
    the limit of Clopper and Pearson (Biometrika 26, 1934). Half of what confidence lacks goes to each of the two.

    It holds if training and held-out patients are random draws from the same people, and for this score alone. With
    few patients it is large however well the set behaves: 3.6 % for a hundred of whom nobody is flagged.

    Args:
        members: (n,), one score per training patient; NaN dropped.
        heldout: (m,), one score per held-out patient; NaN dropped.
        false_positive_rate: in (0, 1).
        confidence: that the share is not larger.

    Returns:
        The limit; 1 at the threshold -inf if there are too few held-out patients for any.

    Raises:
        ValueError: If there is no score of training or of held-out patients.
    """
    a, b, _ = _valid(members, heldout)
    level = 1 - (1 - confidence) / 2
    rank = int(stats.binom.ppf(level, b.size, false_positive_rate)) + 1
    threshold = float(np.sort(b)[-rank]) if rank <= b.size else -np.inf
    flagged = int((a >= threshold).sum())
    upper = float(stats.beta.ppf(level, flagged + 1, a.size - flagged)) if flagged < a.size else 1.0
    return ExtractableShare(upper, flagged, a.size, int((b >= threshold).sum()), b.size, threshold)


def _last_allowed(fpr: Floats, limit: float) -> int:
    return int(np.searchsorted(fpr, limit, side="right")) - 1


def _valid(members: npt.ArrayLike, heldout: npt.ArrayLike) -> tuple[Floats, Floats, int]:
    a, b = np.asarray(members, np.float64), np.asarray(heldout, np.float64)
    dropped = int(np.isnan(a).sum() + np.isnan(b).sum())
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if not a.size or not b.size:
        raise ValueError(
            f"Expected scores of training and of held-out patients, but got {a.size} and {b.size} numbers."
        )
    return a, b, dropped
