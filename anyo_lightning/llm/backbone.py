"""A large language model as an encoder: loading, depth, LoRA, precision, and one forward pass to its last states.

The frozen base is held in `dtype`, LoRA weights in float32. The forward pass opens its own autocast of `dtype` (for
float32 it switches off one around it), and peft's cast of each LoRA input to float32 is switched off, so that every
matrix product runs in `dtype` whatever precision surrounds it. On a CPU with AVX512-BF16 a bfloat16 product takes about
a quarter of the time; on one without, training in bfloat16 takes many times as long as in float32
(`benchmarks/dtype.py`).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig
from torch import Tensor, nn

from anyo_lightning import distributed
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.internals import apply_liger, recompute_activations
from anyo_lightning.llm.aliases import load_config, load_tokenizer, locate
from anyo_lightning.llm.compiled import compile_layers
from anyo_lightning.llm.last_layer import reading
from anyo_lightning.llm.load import is_causal, keep_layers, load_model, max_positions
from anyo_lightning.llm.lora import add_lora, lora_disabled
from anyo_lightning.llm.quantisation import as_noted, check_weights, parameter_count, quantisation
from anyo_lightning.llm.sharding import shard_layers
from anyo_lightning.llm.shared_prefix import Packed, can_share

__all__ = ["Backbone", "DType", "load_tokenizer"]

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Backbone(nn.Module):
    """A pre-trained transformer that maps token ids to the last hidden states.

    Args:
        name: Alias (`smollm2-135m-instruct`, `all-minilm-l6-v2`), local folder, or Hugging Face hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: Precision of the frozen weights and of every matrix product; `auto` is bfloat16 where the hardware has
            it, otherwise float32. The command line writes the choice to config.yaml: a run keeps it on any machine.
        attention: `auto` (what transformers chooses, with a faster `sdpa` on a CPU), or one that transformers knows
            (`sdpa`, `eager`, `flash_attention_2`, ...).
        layers: Keep the first layers only (the final norm stays); None keeps all.
        lora: Fields of peft's `LoraConfig` (or one); None trains nothing.
        compile: Compile the layers in training: faster after a minute or so of compilation; needs a C++ compiler, on a
            GPU Triton.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        quantization_config: Hold the frozen weights of all layers in 4 bits: fields of transformers'
            `BitsAndBytesConfig` (`llm/quantisation.py`); `configs/overlays/quantized.yaml`.
        sharded: With several processes, each holds its share of every layer's frozen weights, and all gather a layer
            while it is computed: for a model that one GPU cannot hold (`configs/overlays/fsdp.yaml`).

    Attributes:
        sharded: Whether the layers are split over several processes, which must then call it equally often.
        hidden_size: Width of the states.
        causal: Whether a state depends on earlier tokens only.
        max_positions: The longest input, in tokens; None when there is no limit.
        identity: Name, revision or content hash, layers, dtype, attention and quantisation: what caches and
            checkpoints note.

    Raises:
        InputError: When the model cannot be found or read, is an encoder-decoder, has fewer layers than asked for,
            when a `lora` field is unknown or fits no layer, or when quantisation is asked for sharded, of quantised
            weights, without bitsandbytes, or otherwise than in 4 bits.
    """

    def __init__(
        self,
        name: str = "smollm2-135m-instruct",
        *,
        revision: str | None = None,
        dtype: DType = "auto",
        attention: str = "auto",
        layers: int | None = None,
        lora: Mapping[str, Any] | LoraConfig | None = None,
        compile: bool = False,  # noqa: A002
        gradient_checkpointing: bool = False,
        quantization_config: Mapping[str, Any] | None = None,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if quantization_config is not None and sharded:
            raise InputError("Expected a sharded backbone without quantization_config, got both: choose one")
        dtype = fast_dtype() if dtype == "auto" else dtype
        four_bit = None if quantization_config is None else quantisation(quantization_config, dtype=dtype)
        self.compiled = compile
        self.sharded = sharded and distributed.world_size() > 1
        self.source = (name, revision)
        location = locate(name, revision)
        config = load_config(location)
        keep_layers(config, layers)
        saved_quantised = getattr(config, "quantization_config", None) is not None
        check_weights(saved_quantised, location.name, again=four_bit is not None, sharded=sharded)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = load_model(location, config, self.dtype, attention, four_bit)
        self.model.requires_grad_(False).train()  # transformers loads into evaluation mode, and Lightning leaves it
        self.hidden_size = int(config.hidden_size)
        self.max_positions = max_positions(self.model, config)
        self.causal = is_causal(self.model, self.embedding_rows)
        self.identity = {
            "name": location.name,
            "revision": location.content or str(location.revision),
            "layers": str(config.num_hidden_layers),
            "dtype": dtype,
            "attention": attention,
        }
        if four_bit is not None:
            self.identity["quantization"] = as_noted(four_bit)
        self._frozen_keys = [f"model.{key}" for key in self.model.state_dict()]
        if lora is not None:
            self._frozen_keys = add_lora(self.model, lora)
        if gradient_checkpointing:
            recompute_activations(self.model)

    def place(self, device: torch.device) -> "Backbone":
        """Put the weights on a device; of a sharded backbone this process's share, layer by layer.

        On a GPU, Liger's kernels are put in where `liger-kernel` is installed (extra `gpu`) and
        the layers are not compiled, which fuses the same.

        Raises:
            InputError: When layers are to be compiled and cannot be.
        """
        if device.type == "cuda" and not self.compiled and find_spec("liger_kernel") is not None:
            apply_liger(self.model)
        if self.compiled:
            compile_layers(self.model, device)
        if self.sharded:
            shard_layers(self.model, device)
        return self.to(device)

    @property
    def parameters_total(self) -> int:
        """The number of parameters, frozen and trained."""
        return parameter_count(self)

    @property
    def embedding_rows(self) -> int:
        """The number of token embeddings: every token id is below it."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def check_token_ids(self, largest: int) -> None:
        """Refuse token ids that have no embedding.

        Args:
            largest: The largest id of all that will be read.

        Raises:
            InputError: When it has none.
        """
        if largest >= self.embedding_rows:
            raise InputError(
                f"Expected a tokenizer that fits {self.identity['name']} ({self.embedding_rows} token embeddings), got "
                f"token id {largest}"
            )

    def check_positions(self, tokens: int, option: str) -> None:
        """Refuse rows that are longer than the model's positions.

        Args:
            tokens: Of the longest row that will be read.
            option: Which option bounds it.

        Raises:
            InputError: When there are fewer positions.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            raise InputError(
                f"Expected {option} with which rows fit the {self.max_positions} positions of {self.identity['name']}, "
                f"got rows of {tokens} tokens: lower {option}"
            )

    def embed(self, token_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens hidden"]:
        """The input embeddings of tokens, before any layer."""
        embeddings: Tensor = self.model.get_input_embeddings()(token_ids)
        return embeddings

    def forward(
        self,
        token_ids: Int[Tensor, "batch tokens"] | None = None,
        *,
        input_embeddings: Float[Tensor, "batch tokens hidden"] | None = None,
        attention_mask: Bool[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens tokens"] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        prefix: Float[Tensor, "prefix hidden"] | None = None,
        read: tuple[Int[Tensor, "*read"], Int[Tensor, "*read"]] | None = None,
        layer: int | None = None,
    ) -> Float[Tensor, "batch tokens hidden"] | Float[Tensor, "*read hidden"]:
        """The hidden states after the last layer and the final norm.

        A causal model needs no attention mask for right-padded rows: no real token sees a pad, and attention keeps
        its fast path. States at padded positions mean nothing.

        The last layer needs only keys and values of every token. Queries, output and feed-forward block are computed
        only at the tokens that are `read`, usually one in six of a history: nine tenths of the layer's weights, but
        not attention itself. This holds for the families in `last_layer.READ_ALONE` (Llama, Qwen, Gemma, ...), and
        without gradient checkpointing.

        Args:
            token_ids: The tokens; or give `input_embeddings`, not both.
            input_embeddings: Vectors instead of tokens (any floating dtype).
            attention_mask: True at real tokens; needed by bidirectional models and for left padding. Or, for each
                token, True at those that it may attend to, itself among them: replaces the causal mask.
            position_ids: Each token's position; by default its place among the real tokens of its row.
            prefix: Embeddings of tokens before each row's own, for a causal model and `input_embeddings` alone. They
                are read once for all rows where `shares_prefix` says so, otherwise once per row; their states are not
                returned, and `read` counts columns behind them.
            read: Rows and columns of the states to return (tensors that broadcast to one shape); None returns all.
            layer: Return the states after this many layers instead (0: the embeddings; no final norm).

        Returns:
            States in the backbone's dtype.

        Raises:
            InputError: When the rows are longer than the model's positions, or the attention takes no mask of pairs.
        """
        assert (token_ids is None) != (input_embeddings is None), "give either tokens or embeddings"
        inputs = token_ids if token_ids is not None else input_embeddings
        assert inputs is not None
        before = 0 if prefix is None else len(prefix)
        self.check_positions(before + inputs.shape[1], "data.max_tokens or data.max_items")
        if prefix is not None and before:
            assert self.causal, "a prefix is for a causal model"
            assert input_embeddings is not None, "give embeddings behind a prefix"
            assert attention_mask is None, "rows behind a prefix are right-padded"
            assert position_ids is None, "positions behind a prefix are its own"
            return self._behind(prefix, input_embeddings, read, layer)
        arguments: dict[str, Any] = {"attention_mask": attention_mask}
        if attention_mask is not None and attention_mask.ndim == 3:
            if self.identity["attention"] not in ("auto", "sdpa"):
                raise InputError(
                    f"Expected attention auto or sdpa where tokens choose what they attend to, "
                    f"got {self.identity['attention']}"
                )
            arguments["attention_mask"] = attention_mask[:, None]  # transformers takes four dimensions as they are
        elif attention_mask is not None and self.causal:
            # positions count real tokens, so that left padding moves nothing
            arguments["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        if self.causal:
            arguments["use_cache"] = False
        else:
            assert attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask[:, 0].all())), (
                "pad a bidirectional model on the right"
            )
        if input_embeddings is not None:
            return self._run(read, layer, inputs.shape, inputs_embeds=input_embeddings.to(self.dtype), **arguments)
        return self._run(read, layer, inputs.shape, input_ids=token_ids, **arguments)

    def shares_prefix(self, tokens: int) -> bool:
        """Whether `forward` reads a prefix once for all rows.

        Args:
            tokens: Of the prefix and a row.
        """
        return self.causal and can_share(self.model, tokens)

    def _behind(
        self,
        prefix: Float[Tensor, "prefix hidden"],
        rows: Float[Tensor, "batch tokens hidden"],
        read: tuple[Tensor, Tensor] | None,
        layer: int | None,
    ) -> Tensor:
        """States of rows behind a prefix."""
        before, (size, tokens) = len(prefix), rows.shape[:2]
        if not self.shares_prefix(before + tokens):
            embeddings = torch.cat([prefix.to(rows.dtype).expand(size, -1, -1), rows], dim=1)
            columns = None if read is None else (read[0], before + read[1])
            states = self(input_embeddings=embeddings, read=columns, layer=layer)
            return states[:, before:] if read is None else states
        packed = Packed(before, size, tokens)
        embeddings = packed.embeddings(prefix, rows).to(self.dtype)
        states = self._run(
            None if read is None else packed.places(*read),
            layer,
            embeddings.shape,
            inputs_embeds=embeddings,
            position_ids=packed.positions(rows.device),
            attention_mask=embeddings.new_zeros(1, 1, 1, 1),  # four dimensions: transformers makes none of its own
            shared_prefix=(before, tokens),
            use_cache=False,
        )
        return packed.unpack(states) if read is None else states

    def _run(
        self, read: tuple[Tensor, Tensor] | None, layer: int | None, shape: torch.Size, **arguments: Any
    ) -> Tensor:
        """The states of one pass of transformers' model over inputs of a shape."""
        with self._precision(self.device), reading(self.model, read, shape[:2]):
            output = self.model(**arguments, output_hidden_states=layer is not None)
        states: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return states if read is None else states[read]

    def with_lora_disabled(self) -> AbstractContextManager[None]:
        """Inside, the forward pass is that of the frozen model."""
        return lora_disabled(self.model)

    def frozen_state_keys(self) -> list[str]:
        """Names in `state_dict()` of the base weights, which a checkpoint leaves out."""
        return list(self._frozen_keys)

    def _precision(self, device: torch.device) -> Any:
        """Autocast to the base's dtype; without its weight cache, which would keep weights cast under `no_grad`."""
        if self.dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=False)
