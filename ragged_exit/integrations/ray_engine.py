"""The Ray engine of ``score``: shards over the actors of a Ray cluster, on as many machines and GPUs as it has.

Every machine must see the model's folder and the shards (a shared file system).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ragged_exit.integrations.score import Engine, Shard, score_shard
from ragged_exit.integrations.scorer import ScoreOptions, Scorer


class ShardActor:
    """One worker: loads the model once, then answers shards. A shard that died with a worker is done again."""

    def __init__(self, options: ScoreOptions, threads: int, device: str | None) -> None:
        torch.set_num_threads(threads)
        self.scorer = Scorer(options, device=device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shards = zip(batch["source"], batch["target"], strict=True)
        return {"rows": [score_shard(self.scorer, Shard(str(source), str(target))) for source, target in shards]}


def ray_engine(*, workers: int, threads: int = 1, gpus: float = 0, address: str | None = None) -> Engine:
    """An engine of ``workers`` actors with ``threads`` CPU cores and ``gpus`` GPUs each.

    address: of a running cluster; None starts one on this machine, unless this process is connected to one. Raises
    ImportError without Ray (``pip install ragged-exit[ray]``); the engine raises ValueError for options that do not fit
    the model, or more workers than the cluster that it started here has room for.
    """
    import ray

    def run(options: ScoreOptions, shards: Sequence[Shard]) -> Iterator[int]:
        Scorer(options)  # what does not fit is told here, in a line, and not by every worker
        started = not ray.is_initialized()
        if started:
            ray.init(address=address or "local", log_to_driver=False, include_dashboard=False)
        try:
            if started and address is None:
                _check_room(ray.cluster_resources(), workers, {"threads": threads, "gpus": gpus})
            done = ray.data.from_items(
                [shard._asdict() for shard in shards], override_num_blocks=len(shards)
            ).map_batches(
                ShardActor,
                fn_constructor_args=(options, threads, "cuda" if gpus else None),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=threads,
                num_gpus=gpus or None,
            )
            for row in done.iter_rows():
                yield int(row["rows"])
        finally:
            if started:
                ray.shutdown()

    return run


def _check_room(room: Mapping[str, float], workers: int, each: Mapping[str, float]) -> None:
    """Raise ValueError where Ray would wait for ever for what this machine does not have."""
    for name, kind in (("threads", "CPU"), ("gpus", "GPU")):
        if workers * each[name] > room.get(kind, 0):
            raise ValueError(
                f"{name}: {workers} workers with {each[name]} each want {workers * each[name]} {kind}s, "
                f"and this machine has {room.get(kind, 0):g}"
            )
