"""Everything distributed: the only package that uses Ray."""
