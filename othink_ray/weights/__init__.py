"""Weights from the learner to the engines: transfer in buckets with digests, and the logprob audit after it."""
