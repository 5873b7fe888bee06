"""Is it the pre-training? Writes a language model with the weights of another, each matrix's in random order.

    python benchmarks/shuffled_weights.py smollm2-135m-instruct runs/shuffled_weights/model

The folder is a model for `--model.encoders.backbone.name`. Architecture, tokenizer and the values in each parameter
are the pre-trained model's, and so is each matrix's Frobenius norm; its spectrum, and what it does with inputs, are
not. Item vectors that are read from texts come from these weights, too, and are less alike than the pre-trained
model's. A figure as high as with pre-trained weights shows that their order is not needed; a lower one would not show
that it is knowledge that was missed.
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
