"""othink_ray: GRPO-D for vision-language models on Ray, vLLM and DeepSpeed."""
