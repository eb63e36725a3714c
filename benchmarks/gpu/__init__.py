"""Checks that need an NVIDIA GPU: correctness and speed of vLLM, attention kernels and pushes; `launch/gpu_check.sh`."""
