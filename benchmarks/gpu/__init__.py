"""What a machine with one NVIDIA GPU can show and a CPU cannot: `launch/gpu_check.sh` runs it."""
