"""How fast this machine trains LoRA in bfloat16 and in float32: tokens per second, and which of the two `auto` chooses.

    python benchmarks/dtype.py [--layers 3] [--rows 4] [--steps 3]

Forward and backward pass of smollm2-135m-instruct's first layers over random tokens, the first step left out.
"""

import argparse
import time

import torch

from anyo_lightning.hardware import fast_dtype
from anyo_lightning.llm.backbone import Backbone

TOKENS = 256  # per row
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}


def main() -> None:
    """Print one line per dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 3, "rows": 4, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device.type}, {torch.get_num_threads()} thread(s): auto is {fast_dtype()}")
    for dtype in ("float32", "bfloat16"):
        backbone = Backbone(dtype=dtype, layers=options.layers, lora=LORA).to(device)
        token_ids = torch.randint(1, 1000, (options.rows, TOKENS), device=device)
        for step in range(options.steps + 1):
            if step == 1:
                started = time.perf_counter()
            backbone(token_ids).float().square().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / options.steps
        print(f"{dtype}: {token_ids.numel() / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
