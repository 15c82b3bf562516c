"""FSDP2 on a 2-D mesh: shards within a row of ranks, and our average over the rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from common import CONFIG, FOLDER, HALF, STEPS, Examples, Model, finish
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

# recipe
import arc_topk


def average_over(replicas, module, **fields):
    exchanges = {}  # by length: parameters without a gradient are not in ``flat``

    def hook(flat):
        n = flat.numel()
        if n not in exchanges:
            exchanges[n] = arc_topk.GradientExchange([flat], process_group=replicas, **fields)
        exchanges[n].all_reduce_([flat])

    module.set_all_reduce_hook(hook)
    return exchanges


# end


def wrapped() -> tuple[nn.Module, dist.ProcessGroup]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = Model()
    fully_shard(model, mesh=mesh["shards"])
    return model, mesh["replicas"].get_group()


def train(first: int, last: int, fields: dict[str, object], save: bool = False) -> list[Tensor]:
    model, replicas = wrapped()
    assert isinstance(model, FSDPModule)
    exchanges = average_over(replicas, model, row_width=8, **fields)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data, rank = Examples(STEPS), dist.get_rank()
    if first > 0:
        content = torch.load(FOLDER / f"half-{rank}.pt", weights_only=False)
        for p, saved in zip(model.parameters(), content["model"], strict=True):
            p.detach().to_local().copy_(saved)
        # What has been exchanged so far: made before its first gradient comes.
        for numel, saved in content["exchanges"].items():
            exchange = arc_topk.GradientExchange(
                [torch.empty(numel)], process_group=replicas, row_width=8, **fields
            )
            exchange.load_state_dict(saved)
            exchanges[numel] = exchange
    for step in range(first, last):
        rows = slice(8 * step + 2 * rank, 8 * step + 2 * rank + 2)
        model(data.inputs[rows], data.targets[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    if save:
        content = {
            "model": [p.detach().to_local().clone() for p in model.parameters()],
            "exchanges": {n: e.state_dict(gather=False) for n, e in exchanges.items()},
        }
        torch.save(content, FOLDER / f"half-{rank}.pt")
    assert exchanges
    return [p.detach().to_local().clone() for p in model.parameters()]


def train_by_torch_alone() -> list[Tensor]:
    """FSDP2's own average over the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = Model()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data, rank = Examples(STEPS), dist.get_rank()
    for step in range(STEPS):
        rows = slice(8 * step + 2 * rank, 8 * step + 2 * rank + 2)
        model(data.inputs[rows], data.targets[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().to_local().clone() for p in model.parameters()]


def main() -> None:
    dist.init_process_group("gloo")
    plain = train(0, STEPS, {"compressor": "dense", "feedback": "none"})
    for ours, theirs in zip(plain, train_by_torch_alone(), strict=True):
        torch.testing.assert_close(ours, theirs, msg="it is not the rows that are averaged over")
    straight = train(0, STEPS, CONFIG)
    train(0, HALF, CONFIG, save=True)
    stopped = train(HALF, STEPS, CONFIG)
    finish(straight, stopped, plain)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
