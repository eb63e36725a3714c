"""The engines: what samples and what learns, each behind a protocol of `base`."""
