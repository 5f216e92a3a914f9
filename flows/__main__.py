"""`python -m flows` is `tidemill`."""

from flows.cli import main

main()
