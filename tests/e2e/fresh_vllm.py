"""Print the greedy accuracy of a model folder in plain vLLM:  python -m tests.e2e.fresh_vllm FOLDER COUNT

vLLM is imported before othink_ray, as in a program that does not use it.
"""

from __future__ import annotations

import io
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
from vllm import LLM, SamplingParams  # isort: split

from PIL import Image

from othink_ray.config.load import load
from othink_ray.data import open_source
from othink_ray.engines.policy import BANNED_BIAS
from othink_ray.families import open_family
from othink_ray.rewards import accuracy


def main(folder: str, count: int) -> None:
    config = load([])
    family = open_family(config.model, folder)
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    source = open_source(config.data, "test")
    prompts = [source.prompt(index) for index in range(count)]
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=config.rollout.max_tokens,
        logit_bias=dict.fromkeys(family.banned_token_ids, BANNED_BIAS),
    )
    requests = [
        {
            "prompt_token_ids": family.prompt_token_ids(prompt),
            "multi_modal_data": {"image": Image.open(io.BytesIO(prompt.images[0])).convert("RGB")},
        }
        for prompt in prompts
    ]
    outputs = engine.generate(requests, greedy, use_tqdm=False)
    right = [accuracy(out.outputs[0].text, prompt.answer) for out, prompt in zip(outputs, prompts, strict=True)]
    print(f"accuracy {sum(right) / count}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
