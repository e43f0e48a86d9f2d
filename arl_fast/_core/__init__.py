"""What everything else stands on: names, options, argument checks, statistics and rules. No autograd."""
