"""othink_ray: GRPO-D for vision-language models on Ray, vLLM and DeepSpeed."""

from othink_ray.torch_companions import install

install()
