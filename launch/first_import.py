"""Import the packages of a run, so that a broken environment fails in set-up; setup_env.sh passes cpu or gpu."""

from __future__ import annotations

import shutil
import sys

import deepspeed
import hydra
import ray
import torch
import vllm
import wandb
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

USED = (deepspeed, hydra, ray, vllm, wandb, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)

if __name__ == "__main__":
    # Without nvidia-smi the environment is built for another machine: an image, a login node.
    if sys.argv[1] == "gpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        cuda = torch.version.cuda
        sys.exit(f"torch {torch.__version__} cannot use the GPU: update the driver, perhaps too old for CUDA {cuda}")
    print(*(getattr(used, "__name__", used) for used in USED))
