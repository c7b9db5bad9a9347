"""Methods, budgets and seeds under one protocol: who is better than whom, than chance, and than training anew.

    protocol = Protocol(config={...}, epochs=15, finetune=10)
    compare(protocol, wanted(["L1Filter"], {"channels": [0.5]}, seeds=[0, 1, 2]), Path("out"))

`protocol.py` says what is run, `running.py` runs it, `meters.py` counts what it costs, `engine.py` shares the runs out
and finds them again after a kill, `table.py` and `picture.py` make of the rows what one reads.
"""

from lightning_prune.comparison.engine import compare as compare
from lightning_prune.comparison.engine import report as report
from lightning_prune.comparison.picture import pareto_front as pareto_front
from lightning_prune.comparison.protocol import Protocol as Protocol
from lightning_prune.comparison.protocol import Run as Run
from lightning_prune.comparison.protocol import read_config as read_config
from lightning_prune.comparison.protocol import wanted as wanted
