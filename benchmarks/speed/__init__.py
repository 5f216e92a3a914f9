"""How fast Tidemill is, beside what a machine allows and what others reach: `python -m benchmarks.speed --help`."""
