"""Is it the pre-training? Writes a language model with the weights of another, each matrix's in random order.

    python benchmarks/shuffled_weights.py smollm2-135m-instruct runs/shuffled_weights/model

The folder is a model for `--model.encoders.backbone.name`. Shape, tokenizer and the values in each matrix are those of
the pre-trained model, so that LoRA begins at the same scale; only what pre-training made of them is gone. A model that
is initialised as for training is another control: its matrices are far smaller, and LoRA weighs more beside them.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from anyo_lightning.llm.aliases import load_tokenizer, locate


def shuffle(model: PreTrainedModel, *, seed: int) -> None:
    """Put the entries of each parameter into a random order, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def main() -> None:
    """Reads one model, writes the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="alias, folder or hub id, as in `anyo fit`")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = AutoModel.from_pretrained(locate(options.model).source)
    shuffle(model, seed=options.seed)
    model.save_pretrained(options.output)
    load_tokenizer(options.model).save_pretrained(options.output)


if __name__ == "__main__":
    main()
