"""Cores of the fidelity metrics, given features."""

import torch
from comparison import Family, Meta, Tensors

from metrics.fidelity import frechet_distance, inception_score, polynomial_mmd
from metrics.manifolds import manifold_scores


def metric_cores(meta: Meta, ref: Tensors) -> Tensors:
    real, generated = ref["in/real"], ref["in/gen"]
    manifolds = manifold_scores(real, generated, meta["nhood_size"])
    subsets = zip(ref["in/kid_real_idx"].long(), ref["in/kid_gen_idx"].long(), strict=True)
    ours = {
        "fid": frechet_distance(real, generated),
        "kid_full": polynomial_mmd(real, generated),
        "kid_subsets": torch.stack([polynomial_mmd(real[r], generated[g]) for r, g in subsets]).mean(),
        "pr": torch.tensor([manifolds.precision, manifolds.recall]),
        "is": torch.stack(inception_score(ref["in/probs"], meta["is_splits"])),
    }
    return {f"expected/{name}": value.float() for name, value in ours.items()}


FAMILIES: dict[str, Family] = {"metric_cores": metric_cores}
