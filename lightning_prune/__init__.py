"""Pruning for PyTorch Lightning."""
from lightning_prune import report
from lightning_prune.cost import count
from lightning_prune.surgery import conform, cut, trace
