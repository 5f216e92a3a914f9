"""A place, tried: whether it keeps each promise of `tidemill.storage.store`, and how fast it is.

Read in this order: `hands` (processes that call a store at an agreed instant), `trial` (what a check is given), `together` and
`alone` (the checks), `promises` (their words), `figures`, `run` (all of it, in a folder of its own that is removed).
"""
