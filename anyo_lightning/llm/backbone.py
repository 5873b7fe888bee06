"""A large language model as an encoder: loading, depth, LoRA, precision, and one forward pass to its last states.

The frozen base is held in `dtype`, LoRA weights in float32. The forward pass opens its own autocast of `dtype` (for
float32 it switches off one around it), and peft's cast of each LoRA input to float32 is switched off, so that every
matrix product runs in `dtype` whatever precision surrounds it. On a CPU with AVX512-BF16 a bfloat16 product takes about
a quarter of the time; on one without, training in bfloat16 takes many times as long as in float32
(`benchmarks/dtype.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

import anyo_lightning.llm.attention  # noqa: F401  (registers the attention "auto")
from anyo_lightning import distributed
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.internals import attention_of
from anyo_lightning.llm.aliases import Location, load_config, load_tokenizer, loading, locate
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.sharding import shard_layers

__all__ = ["Backbone", "DType", "load_tokenizer"]

# Models whose last layer runs once, last, and works on each position alone in these parts.
READ_ALONE = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
POSITION_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")

TRIED_TOKENS = 16
CAUSAL_TOLERANCE = {torch.float32: 1e-5}  # of low precision a thousandth: untrained models attend to little
# Of peft's ways to start LoRA, those that leave the base weights alone: caches and checkpoints rely on these.
LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")

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
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        quantization_config: Passed to transformers (bitsandbytes, ...); needs a GPU.
        sharded: With several processes, each holds its share of every layer's frozen weights, and all gather a layer
            while it is computed: for a model that one GPU cannot hold (`configs/overlays/fsdp.yaml`).

    Attributes:
        sharded: Whether the layers are split over several processes, which must then call it equally often.
        hidden_size: Width of the states.
        causal: Whether a state depends on earlier tokens only.
        max_positions: The longest input, in tokens; None when there is no limit.
        identity: Name, revision or content hash, layers, dtype and attention: what caches and checkpoints note.

    Raises:
        InputError: When the model cannot be found or read, is an encoder-decoder, has fewer layers than asked for,
            when a `lora` field is unknown or fits no layer, or when quantisation is asked for without a GPU or sharded.
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
        gradient_checkpointing: bool = False,
        quantization_config: Mapping[str, Any] | None = None,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if quantization_config is not None and sharded:
            raise InputError("Expected a sharded backbone without quantization_config, got both: choose one")
        if quantization_config is not None and not torch.cuda.is_available():
            raise InputError("Expected a GPU for quantization_config, got none")
        self.sharded = sharded and distributed.world_size() > 1
        self.source = (name, revision)
        location = locate(name, revision)
        config = load_config(location)
        _keep_layers(config, layers)
        dtype = fast_dtype() if dtype == "auto" else dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = _load(location, config, self.dtype, attention, quantization_config)
        self.model.requires_grad_(False).train()  # transformers loads into evaluation mode, and Lightning leaves it
        self.hidden_size = int(config.hidden_size)
        self.max_positions = _max_positions(self.model, config)
        self.causal = _is_causal(self.model, self.embedding_rows)
        self.identity = {
            "name": location.name,
            "revision": location.content or str(location.revision),
            "layers": str(config.num_hidden_layers),
            "dtype": dtype,
            "attention": attention,
        }
        if quantization_config is not None:
            self.identity["quantization"] = json.dumps(dict(quantization_config), sort_keys=True, default=str)
        self._frozen_keys = [f"model.{key}" for key in self.model.state_dict()]
        if lora is not None:
            self._frozen_keys = _add_lora(self.model, lora)
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.disable_input_require_grads()  # only the re-entrant kind needs gradients at the input

    def place(self, device: torch.device) -> "Backbone":
        """Put the weights on a device; of a sharded backbone this process's share, layer by layer."""
        if self.sharded:
            shard_layers(self.model, device)
        return self.to(device)

    @property
    def parameters_total(self) -> int:
        """The number of parameters, frozen and trained."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        read: tuple[Int[Tensor, "*read"], Int[Tensor, "*read"]] | None = None,
        layer: int | None = None,
    ) -> Float[Tensor, "batch tokens hidden"] | Float[Tensor, "*read hidden"]:
        """The hidden states after the last layer and the final norm.

        A causal model needs no attention mask for right-padded rows: no real token sees a pad, and attention keeps
        its fast path. States at padded positions mean nothing.

        The last layer needs only keys and values of every token. Queries, output and feed-forward block are computed
        only at the tokens that are `read`, usually one in six of a history: nine tenths of the layer's weights, but
        not attention itself. This holds for the families in `READ_ALONE` (Llama, Qwen, Gemma, ...), and
        without gradient checkpointing.

        Args:
            token_ids: The tokens; or give `input_embeddings`, not both.
            input_embeddings: Vectors instead of tokens (any floating dtype).
            attention_mask: True at real tokens; needed by bidirectional models and for left padding. Or, for each
                token, True at those that it may attend to, itself among them: replaces the causal mask.
            position_ids: Each token's position; by default its place among the real tokens of its row.
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
        self.check_positions(inputs.shape[1], "data.max_tokens or data.max_items")
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "output_hidden_states": layer is not None}
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
        with self._precision(inputs.device), self._reading(read, inputs.shape[:2]):
            if input_embeddings is not None:
                output = self.model(inputs_embeds=input_embeddings.to(self.dtype), **arguments)
            else:
                output = self.model(input_ids=token_ids, **arguments)
        states: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return states if read is None else states[read]

    @contextmanager
    def _reading(self, read: tuple[Tensor, Tensor] | None, shape: torch.Size) -> Iterator[None]:
        """Inside, the last layer's position-wise parts are computed at these positions and give zeros elsewhere."""
        parts = []
        # gradient checkpointing computes layers again, outside of this context
        if (
            read is not None
            and self.model.config.model_type in READ_ALONE
            and not self.model.is_activation_checkpointing
        ):
            parts = [self.model.layers[-1].get_submodule(name) for name in POSITION_WISE]
            # Not `nonzero` of a mask, for whose size a GPU would be waited for. A place that is read n times is
            # computed n times and counts as 1/n each time, so that its gradient is not n times too large.
            places = (read[0] * shape[1] + read[1]).flatten()
            counts = torch.zeros(shape.numel(), device=places.device).index_add(
                0, places, torch.ones_like(places).float()
            )
            shares = 1 / counts.index_select(0, places)
        before = [part.__dict__.get("forward") for part in parts]  # set by a library's own hooks
        for part in parts:
            part.forward = partial(_at, places, shares, part.forward)
        try:
            yield
        finally:
            for part, forward in zip(parts, before, strict=True):
                del part.forward
                if forward is not None:
                    part.forward = forward

    @contextmanager
    def with_lora_disabled(self) -> Iterator[None]:
        """Inside, the forward pass is that of the frozen model."""
        kinds = BaseTunerLayer | ModulesToSaveWrapper
        adapted = [module for module in self.model.modules() if isinstance(module, kinds)]
        for module in adapted:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in adapted:
                module.enable_adapters(True)

    def frozen_state_keys(self) -> list[str]:
        """Names in `state_dict()` of the base weights, which a checkpoint leaves out."""
        return list(self._frozen_keys)

    def _precision(self, device: torch.device) -> Any:
        """Autocast to the base's dtype; without its weight cache, which would keep weights cast under `no_grad`."""
        if self.dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=False)


def _at(
    places: Int[Tensor, " places"],
    shares: Float[Tensor, " places"],
    forward: Callable[[Tensor], Tensor],
    states: Float[Tensor, "batch tokens width"],
) -> Float[Tensor, "batch tokens out"]:
    """A position-wise `forward` at some positions, counted over the whole batch; zeros elsewhere."""
    batch, tokens, _ = states.shape
    found = forward(states.flatten(0, 1)[places][None])[0]
    found = found * shares[:, None].to(found.dtype)
    return found.new_zeros(batch * tokens, found.shape[1]).index_add(0, places, found).view(batch, tokens, -1)


def _keep_layers(config: PretrainedConfig, layers: int | None) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"Expected a decoder or an encoder as the backbone, got an encoder-decoder ({config.model_type})"
        )
    if not hasattr(config, "hidden_size") or not hasattr(config, "num_hidden_layers"):
        raise InputError(
            f"Expected a language model as the backbone, got {config.model_type}, which is made of several models or "
            "has no states of one width: give its text model"
        )
    if layers is None:
        return
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"Expected layers between 1 and {config.num_hidden_layers}, got {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]


def _load(
    location: Location,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    quantization_config: Mapping[str, Any] | None,
) -> Any:
    options: dict[str, Any] = {}
    if quantization_config is not None:
        options["quantization_config"] = dict(quantization_config)
    with loading(location):
        model, report = AutoModel.from_pretrained(
            location.source,
            config=config,
            revision=location.revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if attention == "auto" and attention_of(model) == "sdpa":  # otherwise it knows `eager` only
            model.set_attn_implementation("auto")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(f"Expected all weights of {location.name}, got none for {len(missing)}, such as {missing[0]}")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's, unused: only the token states are read
    return model


def _is_causal(model: Any, rows: int) -> bool:
    """Whether a later token leaves earlier states alone, found by trying: what models say of themselves is often wrong.

    Args:
        model: As loaded, on any device.
        rows: Number of token embeddings.
    """
    tokens = torch.arange(TRIED_TOKENS, device=model.device)[None] % rows
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % rows
    with evaluating(model):
        first, second = (model(input_ids=ids).last_hidden_state[0, :-1].float() for ids in (tokens, changed))
    return bool((first - second).norm() <= CAUSAL_TOLERANCE.get(model.dtype, 1e-3) * first.norm())


def _max_positions(model: nn.Module, config: PretrainedConfig) -> int | None:
    """The longest input: positions less those that a table like RoBERTa's keeps for padding; None without a limit."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def _add_lora(model: nn.Module, lora: Mapping[str, Any] | LoraConfig) -> list[str]:
    """Inject float32 LoRA weights, the only trained ones; returns the keys of the frozen rest."""
    try:
        config = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
        if config.init_lora_weights not in LORA_STARTS:
            raise InputError(
                f"Expected lora.init_lora_weights among {', '.join(map(str, LORA_STARTS))}, which leave the base "
                f"weights alone, got {config.init_lora_weights}"
            )
        inject_adapter_in_model(config, model)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Expected fields of peft's LoraConfig for lora, got: {' '.join(str(error).split())[:300]}"
        ) from error
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(module.get_base_layer(), nn.Embedding) for module in adapted):
        raise InputError("Expected lora.target_modules without token embeddings, which are read without LoRA, got them")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    return [f"model.{key}" for key in model.state_dict() if key not in trained]
