"""Slice sets as Parquet files with pictures in them and a card, as the Hugging Face `datasets` library reads them.

| file | content |
|---|---|
| `data/train-00000-of-00007.parquet`, ... | one row per slice: T1, T1ce, T2, FLAIR and label as PNG, and the index |
| `README.md` | the card |

Labels are class indices 0..3. Nothing is uploaded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from datamodules.exports import Case, Export, Part, in_parts, open_export, picture, write_file
from datamodules.parallel import run_in_processes
from datamodules.slice_set import CHANNELS, CLASSES, INDEX_COLUMNS

SLICES_PER_FILE = 2048
ROWS_PER_GROUP = 100
"""Few, so that a viewer can show some rows without reading all pictures."""
SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}
COLUMNS = {name: dtype for name, dtype in INDEX_COLUMNS.items() if name != "split"}


def export_huggingface(slice_set: Path, out: Path, skip_faulty: bool = False, workers: int | None = None) -> Path:
    """Write a slice set as Parquet files and a card, for the Hugging Face `datasets` library.

    `load_dataset("OUT")` reads it from the disk; nothing is uploaded. The same command again goes on after an
    interruption.

    Args:
        slice_set: real or synthetic.
        out: folder, new or left by the same command.
        skip_faulty: leave slices with a fault out; `export.json` lists them.
        workers: processes, each with up to 1 GiB of memory; null takes one per core.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds something else, or the set has faults.
    """
    slice_set, out = Path(slice_set), Path(out)
    export = open_export(slice_set, out, "huggingface", skip_faulty, workers)
    jobs: list[tuple[str, Part]] = []
    for split, name in SPLIT_NAMES.items():
        parts = in_parts(export.slices, [case for case in export.cases if case.split == split], SLICES_PER_FILE)
        jobs += [(f"data/{name}-{i:05d}-of-{len(parts):05d}.parquet", part) for i, part in enumerate(parts)]
    export.make_room({path for path, _ in jobs}, ["README.md"])
    run_in_processes(partial(_write_table, out), jobs, export.workers, "Writing")
    export.finish({"README.md": card(export)})
    return out


def _write_table(out: Path, job: tuple[str, Part]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, (slices, cases) = job
    if (out / path).exists():
        return
    pictures: dict[str, list[dict[str, Any]]] = {name: [] for name in CHANNELS}
    for place, case in enumerate(cases):
        for name, channel in zip(CHANNELS, slices.read([place])[0], strict=True):
            pictures[name].append({"bytes": picture(channel), "path": f"{case.name}_{name}.png"})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {name: pa.array(values, image) for name, values in pictures.items()}
    columns |= {name: pa.array(slices.index[name].to_list(), dtype) for name, dtype in COLUMNS.items()}
    features = {name: {"_type": "Image"} for name in CHANNELS}
    features |= {name: {"dtype": dtype, "_type": "Value"} for name, dtype in COLUMNS.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer, row_group_size=ROWS_PER_GROUP)
    write_file(out / path, buffer.getvalue())


def card(export: Export) -> str:
    """Write the card: what the slices are and where they come from, without names of patients."""
    content, kind = export.slices.manifest.content, export.record["kind"]
    counts = {split: sum(case.split == split for case in export.cases) for split in SPLIT_NAMES}
    there = [split for split, count in counts.items() if count]
    head = {
        "pretty_name": export.out.name,
        "task_categories": ["image-segmentation"],
        "tags": ["medical", "mri", "brain", *(["synthetic"] if kind == "synthetic" else [])],
        "size_categories": [_size_category(len(export.cases))],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": SPLIT_NAMES[split], "path": f"data/{SPLIT_NAMES[split]}-*.parquet"} for split in there
                ],
            }
        ],
    }
    height, width = export.slices.manifest.size_px
    numbers = ", ".join(f"{counts[split]:,} {SPLIT_NAMES[split]}" for split in there)
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {export.out.name}",
        f"{len(export.cases):,} {kind} slices of brain MR images with tumour labels ({numbers}), {height} x {width} "
        f"pixels of {export.slices.manifest.spacing_mm:g} mm, 8 bit.",
        *(_of_synthetic(content) if kind == "synthetic" else _of_real(export.cases)),
        "| column | content |\n|---|---|\n"
        "| `T1`, `T1ce`, `T2`, `FLAIR` | grey levels; the rows run from the patient's right to left |\n"
        f"| `label` | {', '.join(f'{number} {name}' for number, name in enumerate(CLASSES))} |\n"
        "| `patient`, `volume`, `z` | whose slice it is, and its place; a synthetic slice is a patient of its own |\n"
        "| `core_px`, `oedema_px`, `enhancing_px` | pixels of each class |",
        f"Faulty slices that were left out: {len(export.record['left_out'])}. Fingerprint of the slice set: "
        f"`{export.record['fingerprint']}`. Made by {export.record['software']}.",
        "No licence is stated here: add one before you share this.",
    ]
    return "\n\n".join(lines) + "\n"


def _of_synthetic(content: Mapping[str, Any]) -> list[str]:
    said = [
        f"{label}: `{content[key]}`"
        for key, label in (
            ("generator", "Generator"),
            ("images_seen", "images seen in training"),
            ("weights_sha256", "SHA-256 of its weights"),
            ("seed", "seed of the emission"),
            ("filtered", "filtered"),
        )
        if key in content
    ]
    patients = len(content.get("patients_seen", []))
    return [
        f"No patient was imaged for this: a generator that was trained on {patients or 'an unknown number of'} real "
        f"patients made every slice. {'; '.join(said)}.",
        "Generators can repeat slices of their training patients. Whether this one did must be measured, against the "
        "training patients and beside held-out ones; this card does not say.",
    ]


def _of_real(cases: Sequence[Case]) -> list[str]:
    patients = len({case.patient for case in cases})
    return [
        f"**These are images of {patients} real patients.** The terms under which they were obtained hold for this "
        "copy too, and may forbid to share it. No patient is in two splits."
    ]


def _size_category(rows: int) -> str:
    """Give the size in the words of the Hub."""
    limits = [(1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((words for limit, words in limits if rows < limit), "1M<n<10M")
