"""Published figures (GLUE, BERT-base) that the study is set beside, as the share of full depth's quality that is kept.

Sources: CascadeBERT's table 2 (GLUE test) for the truncated encoder, DeeBERT, PABEE, CascadeBERT and FastBERT at about
2x, 3x and 4x fewer layers; COSEE's table 2 for BERxiT, at the speed-up in its key; PABEE's README (dev) for STS-B.
"""

from __future__ import annotations

FULL = {"sst2": 93.5, "mrpc": 88.9, "rte": 66.4, "stsb": 88.9}  # accuracy, F1, accuracy, mean of Pearson and Spearman
BASELINE = "truncated"
QUALITY: dict[str, dict[str, dict[float, float]]] = {
    "sst2": {
        BASELINE: {2: 90.9, 3: 87.5, 4: 86.4},
        "deebert": {2: 90.2, 3: 88.8, 4: 85.4},
        "pabee": {2: 89.3, 3: 85.2},
        "cascade": {2: 91.7, 3: 90.9, 4: 90.3},
        "fastbert": {3: 92.1, 4: 90.7},
        "berxit": {2.86: 91.6},
    },
    "mrpc": {
        BASELINE: {2: 85.1, 3: 82.7, 4: 80.5},
        "deebert": {2: 84.4, 3: 83.5, 4: 82.9},
        "pabee": {2: 84.4, 3: 82.6, 4: 79.9},
        "cascade": {2: 85.9, 3: 84.0, 4: 82.6},
        "berxit": {2.27: 86.2},
    },
    "rte": {
        BASELINE: {2: 65.0, 3: 63.0, 4: 55.2},
        "deebert": {2: 64.3, 3: 59.9, 4: 57.4},
        "pabee": {2: 64.0, 3: 60.5, 4: 56.0},
        "cascade": {2: 64.6, 3: 63.8, 4: 61.6},
        "berxit": {2.17: 65.7},
    },
    "stsb": {"pabee": {1.62: 88.7}},
}


def retention(task: str, system: str) -> dict[float, float]:
    """Published quality at each layer speed-up over full depth's; empty where nothing was published."""
    return {speedup: value / FULL[task] for speedup, value in QUALITY[task].get(system, {}).items()}
