"""A version in memory that answers: loaded from the registry, asked with tables or rows, and kept at where its alias stands."""
