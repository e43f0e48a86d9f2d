"""What runs on several processes, under the name that a user of torch.distributed looks for."""

from .sharded import copy_to_shards, sharded_arl_loss

__all__ = ["copy_to_shards", "sharded_arl_loss"]
