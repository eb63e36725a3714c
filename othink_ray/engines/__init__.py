"""Rollout and learner engines, each behind a protocol of `base`."""
