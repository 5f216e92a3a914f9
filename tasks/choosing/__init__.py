"""Which spec is the better one: several on the same held-out rows (`compare`), or another one on what has streamed (`backtest`).

Rooms of the readers: what is trained here is registered in a place of its own, and no model that is in use is changed.
"""
