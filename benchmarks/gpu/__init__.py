"""Checks that need an NVIDIA GPU: vLLM, the learner, attention kernels and pushes; `launch/gpu_check.sh` runs them."""
