"""The training algorithm and the setup of a run; only `build` depends on Ray, vLLM and DeepSpeed."""
