"""The channel graph: which coordinates of which parameters must go together.

Read in this order: `labels` (what a traced tensor carries), `rules` (how operators carry it), `trace` (model ->
records), `groups` (records -> groups, costs, plans).
"""
