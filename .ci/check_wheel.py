"""What an installed platform wheel must show: its kernels serve the CPU and agree with the reference."""

import torch

import arl_fast
from arl_fast.implementations import dispatch

torch.manual_seed(0)
fused, *unimodal = (torch.randn(64, 28) for _ in range(3))
target = torch.randint(28, (64,))
loss, stats = arl_fast.arl_loss(fused, unimodal, target)
expected, wanted = arl_fast.reference.arl_loss(fused, unimodal, target)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(stats, wanted)
report = dispatch.report()
print(report)
assert "cpu: native" in report
