"""What is saved by computing only what is read of the last layer: seconds of a training step, with and without.

    python benchmarks/last_layer.py [--layers 1 3] [--rows 9] [--every 7] [--steps 3]

Forward and backward pass of smollm2-135m-instruct's first layers over random tokens, of which every seventh is read, as
at the ends of titles. The states are compared; the first step is not timed.
"""

import argparse
import time

import torch

from anyo_lightning.llm.backbone import Backbone

TOKENS = 333  # per row
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}


def main() -> None:
    """Print one line per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    for name, value in {"rows": 9, "every": 7, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for layers in options.layers:
        torch.manual_seed(0)
        backbone = Backbone(layers=layers, lora=LORA).to(device)
        token_ids = torch.randint(1, 1000, (options.rows, TOKENS), device=device)
        columns = torch.arange(options.every - 1, TOKENS, options.every, device=device)
        places = torch.arange(options.rows, device=device)[:, None], columns[None]
        seconds, states = [], []
        for read in (None, places):
            for step in range(options.steps + 1):
                if step == 1:
                    started = time.perf_counter()
                found = backbone(token_ids, read=read)
                found = found[places] if read is None else found
                found.float().square().mean().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / options.steps)
            states.append(found.detach().float())
        difference = float((states[0] - states[1]).norm() / states[0].norm())
        print(
            f"{layers} layer(s), {backbone.identity['dtype']}: all {seconds[0]:.2f} s, read {seconds[1]:.2f} s, "
            f"{1 - seconds[1] / seconds[0]:.0%} saved; states differ by {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
