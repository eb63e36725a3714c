"""The same work here and in Hugging Face TRL, in turn on the same cores: `make bench`."""
