"""Collectives in one process and in several."""

from __future__ import annotations

import pytest
import torch

from effdet import distributed as D


def test_one_process():
    assert (D.get_world_size(), D.get_rank(), D.get_local_rank(), D.get_local_size()) == (
        1,
        0,
        0,
        1,
    )
    assert D.is_main_process()
    D.synchronize()
    assert D.all_gather("a") == ["a"] and D.gather("a") == ["a"] and D.broadcast("a") == "a"
    assert 0 <= D.shared_random_seed() < 2**31
    values = {"loss": torch.tensor(2.0)}
    assert D.reduce_dict(values) == values
    container = {"boxes": torch.ones(2, 4), "more": [torch.zeros(3), (torch.ones(1),)]}
    joined = D.all_gather_container(container)
    assert torch.equal(joined["boxes"], container["boxes"])
    assert isinstance(joined["more"][1], tuple)
    assert torch.equal(D.gather_container(torch.ones(2), 0), torch.ones(2))


def test_container_of_something_else():
    with pytest.raises(TypeError, match="container: got str"):
        D.all_gather_container(["a"])


def _work(rank: int, world_size: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    D.synchronize()
    mine = {"ids": torch.arange(rank + 1), "pair": (torch.full((1, 2), float(rank)),)}
    loss = torch.tensor(float(rank))
    results = {
        "rank": (D.get_rank(), D.get_world_size(), D.is_main_process()),
        "all": D.all_gather({"rank": rank}),
        "one": D.gather(rank, dst=1),
        "broadcast": D.broadcast(rank, src=1),
        "seed": D.shared_random_seed(),
        "sum": D.reduce_dict({"loss": loss}, average=False)["loss"],
        "mean": D.reduce_dict({"loss": loss})["loss"],
        "untouched": loss,
        "container": D.all_gather_container(mine),
        "container_one": D.gather_container(mine["ids"], 1),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes(tmp_path):
    world_size = 3
    torch.multiprocessing.spawn(_work, (world_size, str(tmp_path)), nprocs=world_size)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    ids = [0, 0, 1, 0, 1, 2]
    for rank, result in enumerate(results):
        assert result["rank"] == (rank, 3, rank == 0)
        assert result["all"] == [{"rank": other} for other in range(3)]
        assert result["one"] == ([0, 1, 2] if rank == 1 else [])
        assert result["broadcast"] == 1
        assert result["seed"] == results[0]["seed"]
        assert result["untouched"] == rank
        assert result["container"]["ids"].tolist() == ids
        assert result["container"]["pair"][0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert results[0]["sum"] == 3 and results[0]["mean"] == 1
    assert results[1]["container_one"].tolist() == ids
    assert results[0]["container_one"] is None and results[2]["container_one"] is None
