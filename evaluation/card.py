"""The data card of a release: what a synthetic set is, how useful, how near to its patients, and what nobody knows.

One list of sections, written as Markdown, as a page that needs no other file, and as JSON with the unrounded numbers.
It shows no real image and names no patient, unless both are asked for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datamodules.slice_set import write_atomically
from evaluation.card_sections import NO_PROOF, Card, Section, make_sections
from evaluation.charts import to_png
from evaluation.detectors import Found
from evaluation.release_tests import Parts, Results
from evaluation.slice_figures import PictureRow, slice_rows

STYLE = Path(__file__).with_name("page.css")
EXAMPLES = 6
PICTURES = {"examples": "examples.png", "nearest": "nearest.png"}


def write_card(folder: Path, card: Card, parts: Parts, results: Results) -> None:
    """Write card.html, card.md, card.json and the pictures of a release to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(card, parts, results)
    for name, picture in pictures.items():
        write_atomically(folder / PICTURES[name], picture)
    failed = [criterion for criterion in results.criteria if not criterion.holds]
    content = {
        "title": card.title,
        "subtitle": _subtitle(parts, results),
        "verdict_label": "Declared thresholds: all hold" if results.verdict else "Declared thresholds: not for release",
        "verdict": NO_PROOF
        if results.verdict
        else f"{len(failed)} of {len(results.criteria)} do not hold: {'; '.join(c.text for c in failed)}.",
        "sections": make_sections(card, parts, results, _picture_sections(card, pictures)),
    }
    for name, escape in (("card.html", True), ("card.md", False)):
        environment = Environment(
            loader=FileSystemLoader(STYLE.parent),
            autoescape=escape,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        write_atomically(folder / name, environment.get_template(name).render(content) + "\n")
    write_atomically(folder / "card.json", json.dumps(_machine_readable(card, parts, results), indent=1) + "\n")


def _subtitle(parts: Parts, results: Results) -> str:
    size = parts.synthetic.manifest.size_px
    return (
        f"Data card by StandIn {version('standin')}. {int((~results.removed).sum())} synthetic slices of {size[0]} × "
        f"{size[1]} px, {parts.synthetic.manifest.spacing_mm:g} mm per pixel: T1, T1ce, T2, FLAIR and tumour label."
    )


def _picture_sections(card: Card, pictures: Mapping[str, bytes]) -> list[Section]:
    captions = {
        "examples": "Drawn at random from what is shared, not chosen.",
        "nearest": "The slices of this set that come nearest to a training slice, the nearest first"
        + (", each beside that real slice." if card.with_real_images else ". The real slices are not shown."),
    }
    titles = {"examples": "Examples", "nearest": "Nearest first"}
    return [
        Section(
            titles[name],
            picture=base64.b64encode(png).decode(),
            file=PICTURES[name],
            caption=captions[name],
        )
        for name, png in pictures.items()
    ]


def _pictures(card: Card, parts: Parts, results: Results) -> dict[str, bytes]:
    """Draw what is kept; what was removed is near to a patient and is shown nowhere."""
    positions = np.flatnonzero(~results.removed)
    if not len(positions):
        return {}
    some = np.sort(np.random.default_rng(0).permutation(positions)[:EXAMPLES])
    rows = [PictureRow("", (one,)) for one in parts.synthetic.read(some)]
    found = results.found[card.filter_by]
    return {
        "examples": to_png(slice_rows(rows, ("Synthetic slices",))),
        "nearest": to_png(_nearest(positions, found, parts, card.with_real_images)),
    }


def _nearest(positions: np.ndarray, found: Found, parts: Parts, with_real_images: bool) -> Any:
    order = positions[np.argsort(-np.nan_to_num(found.statistic[positions], nan=-np.inf), kind="stable")][:EXAMPLES]
    rows = []
    for position in order:
        slices = [parts.synthetic.read([position])[0]]
        if with_real_images:
            slices.append(parts.training.read([found.nearest[position]])[0])
        rows.append(PictureRow(f"{found.statistic[position]:.3f}", slices))
    titles = ("Synthetic slice", "Nearest training slice") if with_real_images else ("Synthetic slice",)
    return slice_rows(rows, titles)


def _machine_readable(card: Card, parts: Parts, results: Results) -> dict[str, Any]:
    """Give all numbers; patients are numbered and not named."""
    shown = {name: table for name, table in results.tables.items() if name not in ("suspicious", "patients")}
    patients = results.tables["patients"].drop(columns="patient")
    return {
        "title": card.title,
        "software": f"standin {version('standin')}",
        "verdict": "thresholds hold" if results.verdict else "thresholds do not hold",
        "caution": NO_PROOF,
        "slices_made": len(results.removed),
        "slices_removed": int(results.removed.sum()),
        "training_patients": len(parts.training.patients),
        "held_out_patients": len(parts.held_out.patients),
        "generator": {
            name: parts.synthetic.manifest.content.get(name)
            for name in ("generator", "hyperparameters", "images_seen", "weights_sha256", "seed", "standin_version")
        },
        "filter": card.filter_by,
        "criteria": [
            {"name": c.name, "measured": _json(c.measured), "limit": c.limit, "holds": c.holds, "text": c.text}
            for c in results.criteria
        ],
        **{name: _records(table) for name, table in {**shown, "patients": patients}.items()},
        "usefulness": None if card.usefulness is None else _records(card.usefulness),
        "sha256": dict(card.hashes),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _json(value) for key, value in row.items()} for row in table.to_dict("records")]


def _json(value: Any) -> Any:
    """Turn NaN and infinity, which JSON does not know, into null."""
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
