"""The math of GRPO-D: pure functions on numbers, arrays and tensors."""
