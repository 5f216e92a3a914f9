"""Seeded inputs for everything that Tidemill parses: how they are made, what must hold of each, and how they are run."""
