"""The commands of ``lightning-prune``: parse, call, print."""
