"""Plain PyTorch training from Arrow tables: no storage, no orchestration.

Read in this order: `spec` (what a run is asked to do), `groups` (where rows come from), `columns` and `features`
(Arrow to numbers), `batches` (rows to shuffled batches), `models`, `learner` (all that training changes) and `loop`.
Nothing is imported here, so that `tidemill.tasks.training.spec` stays cheap for a command line.
"""
