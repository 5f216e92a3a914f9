"""Bytes, keys, Parquet and versions: neither torch nor Prefect.

Read in this order. The store: `store` (the verbs and their promises), `local` with `files`, `s3` with `s3_errors`,
`memory`, `urls`, `probe`. The log: `manifest` (the record whose creation is a commit), `chain`, `log`, `aliases`,
`tombstones`, `runs`, `retention`, `traces`, `audit`. What waits, and how it leaves: `inbox`, `disposal`, `overlap`.
Data: `parquet` with `ranges` and `pages`, `partitions`, `dataset`, `lakehouse`. Nothing is imported here: the command
line must answer at once.
"""
