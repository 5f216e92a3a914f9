"""`python -m tidemill` is `tidemill`."""

from tidemill.flows.cli import main

main()
