"""Functions run by several processes that talk over gloo, as torchrun would start them."""

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastsae.sharding import Shards


def run_ranks(
    latents: int, data: int, work: Callable[..., Any], *args: Any, seconds: float = 60
) -> list[Any]:
    """What work(shards, *args) returns on each rank: tensors and plain data.

    `work` is a function of a module of the tests.
    """
    # Forked from a server that has the packages: a process that imports torch takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "fastsae.cli", "ranks"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(rank, latents, data, folder, seconds, work, args))
            for rank in range(latents * data)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        results = []
        for rank in range(latents * data):
            error, result = folder / f"{rank}.txt", folder / f"{rank}.pt"
            assert not error.exists(), f"rank {rank}: {error.read_text()}"
            where = (folder / f"{rank}.where").read_text()
            assert result.exists(), f"rank {rank}: no result; {len(hung)} processes hung\n{where}"
            results.append(torch.load(result, weights_only=True))
        return results


def _rank(
    rank: int,
    latents: int,
    data: int,
    folder: Path,
    seconds: float,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    where = (folder / f"{rank}.where").open("w")
    faulthandler.dump_traceback_later(0.8 * seconds, file=where)
    try:
        store = dist.FileStore(str(folder / "store"), latents * data)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=latents * data)
        result = work(Shards(latents, data), *args)
        torch.save(result, folder / f"{rank}.part")
        (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        if not (folder / f"{rank}.pt").exists():
            (folder / f"{rank}.txt").write_text(traceback.format_exc())
