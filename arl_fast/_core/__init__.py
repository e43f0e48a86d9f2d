"""What everything else stands on: names and fields, options, argument checks, statistics and rules. No autograd here."""
