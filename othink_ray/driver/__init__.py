"""The training algorithm and the setup of a run; `loop`, `async_loop` and `sft` need no Ray, vLLM or DeepSpeed."""
