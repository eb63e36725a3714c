"""Weight transfer from the learner to the engines: buckets, digests of received weights, and the logprob audit."""
