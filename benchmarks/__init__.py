"""Benchmark of this system against Hugging Face TRL, in turn on the same cores: `make bench`."""
