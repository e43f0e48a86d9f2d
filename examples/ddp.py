"""Several processes: torchrun --nproc-per-node 2 examples/ddp.py

With ``sync_stats=True`` one small all-reduce gives every process the statistics, the coefficients and the
loss of the joined batch, and DistributedDataParallel's averaged gradients are those of one process on that
batch, even if the processes' shares differ in size. Without it (the default) every process uses its own
share's statistics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from synthetic import TwoModalities, pairs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import arl_fast


def main(epochs: int = 2, rows: int = 256) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)

    data = pairs(rows)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(TwoModalities().to(device))
    criterion = arl_fast.ARLLoss(sync_stats=True).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            audio, visual, target = (x.to(device) for x in batch)
            optimizer.zero_grad()
            loss = criterion(model(audio, visual), target)  # the same number on every process
            loss.backward()
            optimizer.step()
        stats = criterion.stats
        gains = [round(g, 4) for g in stats.gains.tolist()]
        line = f"epoch {epoch}: loss {loss.item():.6f}, rows {int(stats.count[0])}, gains {gains}"
        seen: list = [None] * dist.get_world_size()
        dist.all_gather_object(seen, line)
        assert len(set(seen)) == 1, seen
        if rank == 0:
            print(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
