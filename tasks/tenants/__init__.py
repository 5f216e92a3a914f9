"""Many models in one process: each a tenant with an inbox, a history and settings of its own, trained by turns.

Read in this order: `pairs` (who there is), `doors` (`drain` and `follow` of many), `rota` (whose turn it is), `tenant` (one of
them: the run of `tidemill.tasks.online`, as it is); then what they use: `lookouts`, `naming`, `report`, `watching`, `web`.
"""
