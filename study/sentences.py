"""The sentences of the report: which set stands in for the real one, at what price, at what risk, and what to doubt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation.memorization import JOINT
from study.arms import CLASS_MEAN, Arm
from study.results import ALL_MODALITIES, FEW_PATIENTS, NULL_QUANTILE, Study
from study.words import FEW_ARMS, Tables, number, percent, percent_interval, rows_of

STANDS_IN = 0.8
"""Of the real Dice; the paper reports 80 to 90 % for training on synthetic slices alone."""

RARELY = 0.5
WEAK_DICE = 0.5
"""Of training on real slices: below it a ratio to it is one of beginners."""


def headline(tables: Tables) -> str:
    """Say whether a synthetic set stands in for the real one, at what price in Dice and at what risk.

    It does if the whole interval of the ratio is at `STANDS_IN` or above, and does not if the whole interval is below;
    wide intervals decide nothing. Of several arms the one with the largest Dice is taken. Empty where nothing was
    trained on synthetic slices alone and on real ones.
    """
    dice = {row["arm"]: row["dice"] for row in rows_of(tables["dice"], entity=CLASS_MEAN)}
    rows = rows_of(tables["ratio_to_real"], entity=CLASS_MEAN, kind="synthetic")
    rows = [row for row in rows if not np.isnan(row["ratio"])]
    if not rows:
        return ""
    best = max(rows, key=lambda row: dice[row["arm"]])
    own, real = dice[best["arm"]], dice[best["baseline"]]
    share = percent_interval(best["ratio"], best["ci_low"], best["ci_high"], long=True)
    slices = f"the slices of {best['source']}" if best["source"] else "the synthetic slices"
    chosen = f", the best of {len(rows)} arms and so a flattering one," if len(rows) > 1 else ""
    if best["ci_low"] >= STANDS_IN:
        verdict = f"{slices[0].upper()}{slices[1:]} stand in for the real ones"
    elif best["ci_high"] < STANDS_IN:
        verdict = (
            f"{'No synthetic set stands' if len(rows) > 1 else 'The synthetic set does not stand'} in for the real one"
        )
    else:
        verdict = f"Whether {slices} stand in for the real ones cannot be said with {best['pairs']} patients"
    change = f"a {'price' if own <= real else 'gain'} of {number(abs(real - own))}"
    text = (
        f"{verdict}: trained on these slices alone, {best['runs']}{chosen} reaches a Dice of {number(own)} against "
        f"{number(real)}, {change} and {share} of the real Dice, where the paper's least is {percent(STANDS_IN, 0)}."
    )
    return f"{text} {_risk(tables, best['source'])}"


def _risk(tables: Tables, source: str) -> str:
    """What the search says of the generators of an arm."""
    sentences = []
    for generator in source.split(" + "):
        for row in rows_of(tables["search"], generator=generator, score=JOINT):
            share = percent_interval(row["share"], row["ci_low"], row["ci_high"], long=True)
            chance = percent(row["false_alarm_rate"])
            if np.isnan(row["ci_low"]):
                verdict = "with so few held-out patients that nothing is established"
            elif row["ci_low"] > row["false_alarm_rate"]:
                verdict = "more than chance"
            else:
                verdict = "not measurably more than chance"
            sentences.append(
                f"The risk: {share} of the slices of {generator} are suspiciously near to training slices, where "
                f"chance puts {chance}: {verdict}."
            )
    sentences = sentences or ["The risk is unknown: `standin memorization` has not searched these slices."]
    for generator in source.split(" + "):
        for row in rows_of(tables["memorization"], generator=generator, image=ALL_MODALITIES):
            if row["ci_low"] > 1 - NULL_QUANTILE:  # one search that finds nothing must not hide what the other finds
                share = percent_interval(row["share_above_q95"], row["ci_low"], row["ci_high"], long=True)
                sentences.append(
                    f"As they are, {share} of them are nearer than 95\u00a0% of the held-out slices, where chance puts "
                    "5\u00a0%: more than chance."
                )
    return " ".join(sentences)


def search_sentences(tables: Tables) -> list[str]:
    """What the search over flips and shifts says of every generator, and what it would rarely find."""
    sentences = []
    for row in rows_of(tables["search"], score=JOINT):
        flips = "left-right flips and " if row["mirror"] else ""
        share = percent_interval(row["share"], row["ci_low"], row["ci_high"], long=True)
        text = (
            f"Searched over {flips}shifts of up to {row['max_shift_px']} pixels, in the whole image and within the "
            f"brain, {share} of the slices of {row['generator']} are suspiciously near to training slices (chance: "
            f"{percent(row['false_alarm_rate'])})."
        )
        if row["ci_low"] > row["false_alarm_rate"]:
            text += f" They come near to {row['reproduced_patients']} of {row['training_patients']} training patients."
        rarely = [
            one["kind"].replace("_", " ")
            for one in rows_of(tables["sensitivity"], generator=row["generator"])
            if one["rate"] < RARELY
        ]
        if rarely:
            text += f" Copies that it finds in less than half of the cases: {', '.join(rarely)}."
        sentences.append(text)
    return sentences


def usefulness_sentences(study: Study, tables: Tables) -> list[str]:
    """What share of the real Dice each arm with synthetic slices reaches, as sentences."""
    if not study.arms:
        return ["No segmenter was given, so nothing is said about usefulness."]
    if not any(arm.kind == "real" for arm in study.arms):
        return ["No segmenter was trained on real slices only, so there is nothing to compare with."]
    compared = list(study.compared())
    if len(compared) > FEW_ARMS:
        compared = _best_of_each(compared)
    several = len({arm.stem for arm, _ in compared}) > len({(arm.kind, arm.source) for arm, _ in compared})
    sentences = []
    for arm, real in compared:
        row = rows_of(tables["ratio_to_real"], arm=arm.name, entity=CLASS_MEAN)[0]
        own, reference = (
            rows_of(tables["dice"], arm=name, entity=CLASS_MEAN)[0]["dice"] for name in (arm.name, real.name)
        )
        source = arm.source or "synthetic"
        how = {
            "synthetic": f"Trained only on the synthetic slices of {source}",
            "real + synthetic": f"Trained on real slices and those of {source} together",
        }[arm.kind]
        share = percent_interval(row["ratio"], row["ci_low"], row["ci_high"], long=True)
        who = arm.stem if several or len(study.arms) > FEW_ARMS else "the segmenter"
        sentences.append(
            f"{how}, {who} reaches {share} of the Dice of training on real slices ({number(own)} against "
            f"{number(reference)}; mean of the three classes, {len(study.patients)} unseen patients)."
        )
    if len(study.arms) > FEW_ARMS and sentences:
        sentences.append("These are the best arms of each generator; all are in the table.")
    return sentences or ["No segmenter was trained on synthetic slices."]


def _best_of_each(compared: Sequence[tuple[Arm, Arm]]) -> list[tuple[Arm, Arm]]:
    """Of every kind and source the arm with the largest Dice."""
    best: dict[tuple[str, str], tuple[Arm, Arm]] = {}
    for arm, real in compared:
        other = best.get((arm.kind, arm.source))
        if other is None or _mean_dice(arm) > _mean_dice(other[0]):
            best[arm.kind, arm.source] = (arm, real)
    return list(best.values())


def _mean_dice(arm: Arm) -> float:
    return float(arm.mean_dice[CLASS_MEAN].mean())


def safety_sentence(row: dict[str, Any]) -> str:
    """Whether synthetic slices are nearer to training slices than unseen patients are; `row` is of the joint search."""
    name = row["generator"]
    if not row["slices"] or np.isnan(row.get("median", np.nan)):
        return f"The slices of {name} are constant images or none could be compared: memorization is undefined."
    expected = 1 - NULL_QUANTILE
    slices = f"synthetic slices of {name}"
    if np.isnan(row["ci_low"]):
        few = row["held_out_patients"]
        verdict = (
            f"With {few} held-out patient{'s' * (few != 1)} it cannot be said whether the {slices} are nearer to the "
            "training slices than unseen patients are"
        )
    elif row["ci_low"] > expected:
        verdict = f"The {slices} are nearer to the training slices than unseen patients are"
    elif row["ci_high"] < expected:
        verdict = f"The {slices} are less near to the training slices than unseen patients are"
    else:
        verdict = f"The {slices} are not measurably nearer to the training slices than unseen patients are"
    share = percent_interval(row["share_above_q95"], row["ci_low"], row["ci_high"], long=True)
    beyond = round(row["share_above_max"] * row["slices"])
    worst = (
        f"{beyond} of {row['slices']} are nearer than every held-out slice: look at the nearest pairs below."
        if beyond
        else "None is nearer than the nearest held-out slice."
    )
    return (
        f"{verdict}: largest correlation {number(row['median'])} (median) against {number(row['median_held_out'])} for "
        f"held-out patients; {share} of them lie above the held-out 95th percentile, where chance puts 5\u00a0%. "
        f"{worst}"
    )


def warnings(study: Study, memorization: pd.DataFrame) -> list[str]:
    """What a reader must know before believing the numbers; `memorization` is the table of that name."""
    found = []
    runs = [one.run for one in study.runs]
    n = len(study.patients)
    if study.arms and n < FEW_PATIENTS:
        found.append(
            f"Only {n} test patients (fewer than {FEW_PATIENTS}): intervals are wide and, from a bootstrap of so few, "
            "rather too narrow than too wide. Read them as a rough guide."
        )
    real = {arm.name: float(arm.mean_dice[CLASS_MEAN].mean()) for arm in study.arms if arm.kind == "real"}
    for name, dice in real.items():
        if dice < WEAK_DICE:
            found.append(
                f"The segmenter trained on real slices ({name}) has learned little: its Dice is {number(dice)}. What "
                "is relative to it says little about a full training."
            )
    few = sorted({int(row["held_out_patients"]) for row in rows_of(memorization, image=ALL_MODALITIES)})
    if few and few[0] < FEW_PATIENTS:
        found.append(
            f"The null of the memorization check comes from only {few[0]} held-out patient{'s' * (few[0] != 1)}."
        )
    commits = sorted({str(run["git_commit"])[:8] for run in runs})
    if len(commits) > 1:
        found.append(f"The runs come from different versions of the program (commits {', '.join(commits)}).")
    dirty = [run["name"] for run in runs if run["git_dirty"]]
    if dirty:
        found.append(f"Made with uncommitted changes of the program: {', '.join(dirty)}.")
    found += _foreign_data(study)
    split_of = dict(zip(study.real.index["patient"], study.real.index["split"], strict=True))
    leaked = [patient for patient in study.patients if split_of.get(patient) == "train"]
    if leaked:
        found.append(
            f"{len(leaked)} test patients are in the training split of {study.real.root}: {', '.join(leaked[:5])}. "
            "Their Dice is not that of unseen patients."
        )
    unknown = [patient for patient in study.patients if patient not in split_of]
    if unknown:
        found.append(f"{len(unknown)} test patients are not in {study.real.root}: {', '.join(unknown[:5])}.")
    seen = {str(p) for g in study.generators for p in g.synthetic.manifest.content.get("patients_seen", [])}
    seen &= set(study.patients)
    if seen:
        found.append(f"Generators were trained on {len(seen)} of the test patients: {', '.join(sorted(seen)[:5])}.")
    return found


def _foreign_data(study: Study) -> Iterator[str]:
    known = {study.real.manifest.fingerprint: "real"}
    known |= {g.synthetic.manifest.fingerprint: g.name for g in study.generators}
    for one in study.runs:
        for part in one.run["training_sets"]:
            if part["fingerprint"] not in known:
                whose = "the real set" if part["kind"] == "real" else "any generator"
                yield (
                    f"{one.name} was trained on {part['root']} (fingerprint {part['fingerprint'][:8]}), which is not "
                    f"the set of {whose} of this report: it has changed since, or is another one."
                )
