"""What arl_fast.fusion is made of: the held-out rows, the fit, the report."""
