"""Online training, one room for each part of the protocol in docs/guarantees.md. `step` is the protocol itself: read it first."""
