"""Units of work as plain functions, and the pipelines that are made of them.

Read in this order: `settings`, `batch_run` and `batch` (batch training), `online` (online training, a folder),
`predict`, `reproduce`; then what they share: `versions` (from the log to a learner), `table` (a dataset in memory),
`code` (which code trains), `trial` (a new model on a few rows), `retrying`, `stopping`, `scores`. `training` is the
PyTorch part. `wrappers` makes Prefect tasks of these functions, and is the only room here that imports Prefect.
Nothing is imported here.
"""
