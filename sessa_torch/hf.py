"""The language model of Sessa in transformers, over the modules of this package.

Importing this module registers it with AutoModelForCausalLM. The names of the parameters are those
of the checkpoint, so a checkpoint folder is read and written as it is.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sessa_common.extras import install

try:
    from transformers import (
        AutoModelForCausalLM,
        Cache,
        DynamicCache,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.generation import GenerationConfig, GenerationMode
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; {install('transformers')}", name=error.name) from None

from sessa_common import config as shared
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.stored_types import EXACT
from sessa_common.errors import SessaError
from sessa_common.inference.cache_contents import is_trimmable
from sessa_common.storage import is_ours
from sessa_torch.checkpoint import to_tensor
from sessa_torch.hf_cache import adopt, advance, view, visible_mask
from sessa_torch.hf_config import SessaConfig
from sessa_torch.model import SessaModel


class SessaBackbone(SessaModel):
    """The stack of layers under the call of transformers' models, which TRL makes by itself."""

    gradient_checkpointing = False

    def __init__(self, config: shared.SessaConfig) -> None:
        super().__init__(config)
        self._preserve_rng_state = True  # Adapters such as LoRA may have dropout.

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, P+T)
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) after the final norm; a cache is extended by them.

        Positions follow from the mask; `position_ids` may only confirm them. Raises SessaError for
        other positions, a mask that is not (B, P+T), and outputs that the model does not keep.
        """
        if output_attentions or output_hidden_states:
            name = "output_attentions" if output_attentions else "output_hidden_states"
            raise SessaError(f"{name} is true; Sessa's layers do not return them")
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise SessaError("give either input_ids or inputs_embeds")
        seen = visible_mask(attention_mask)
        _require_consecutive(position_ids, seen)
        self.checkpoint_layers = self.gradient_checkpointing and self.training
        past = past_key_values
        if use_cache and past is None:
            past = DynamicCache()
        if past is None:
            x = super().forward(given, attention_mask=seen)
        else:
            adopt(past, self.config)
            x = super().forward(given, cache=view(past, self.config), attention_mask=seen)
            advance(past, given.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past)


class SessaForCausalLM(PreTrainedModel, GenerationMixin):
    """A Sessa language model that transformers, PEFT and TRL can load, train and generate with."""

    config_class = SessaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SessaLayer", "TransformerLayer", "Mamba2Layer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = list(EXACT)  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SessaConfig) -> None:
        if getattr(config, "quantization", None):
            raise SessaError(
                "the weights are quantised by MLX, which transformers cannot read; convert the "
                "folder with `framework` torch first"
            )
        super().__init__(config)
        self.architecture = config.architecture
        self._is_stateful = not is_trimmable(self.architecture)
        self.model = SessaBackbone(self.architecture)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the parameters that no file gave, as `initial_weights` does, by torch's seed."""
        missing = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta
        }
        if not missing:
            return
        weights = initial_weights(self.architecture, int(torch.randint(2**31, ())))
        for name, parameter in missing.items():
            if name in weights:
                parameter.copy_(to_tensor(weights[name]))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, P+T)
        position_ids: Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # (B, T, D)
        labels: Tensor | None = None,  # (B, T)
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of token ids or of embeddings, and the loss of labels where given.

        The other arguments and errors are those of the backbone.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions or self.config.output_attentions,
            output_hidden_states=output_hidden_states or self.config.output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=states.past_key_values
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Let transformers choose a cache, and put Sessa's layers into it before it is asked."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if model_kwargs.get("past_key_values") is not None:
            adopt(model_kwargs["past_key_values"], self.architecture)

    def _validate_generation_mode(
        self, mode: GenerationMode, generation_config: GenerationConfig, others: dict[str, Any]
    ) -> None:
        drafts = getattr(others.get("assistant_model"), "_is_stateful", False)
        if mode == GenerationMode.ASSISTED_GENERATION and (self._is_stateful or drafts):
            whose = "the model" if self._is_stateful else "the assistant model"
            raise SessaError(
                f"{whose} has a Mamba-2 layer, whose state cannot be rolled back when a drafted "
                "token is refused; generate without assistant_model and prompt_lookup_num_tokens"
            )
        super()._validate_generation_mode(mode, generation_config, others)  # type: ignore[misc]

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does.

        Raises SessaError for a folder that this project wrote: its manifest would name the old
        weights.
        """
        if is_ours(Path(save_directory)):
            raise SessaError(f"{save_directory}: holds a checkpoint of sessa; save into another")
        if isinstance(self.config.eos_token_id, list):
            self.generation_config.eos_token_id = self.config.eos_token_id
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: saving writes a short file that imports this module, not a copy of it."""


def _require_consecutive(position_ids: Tensor | None, seen: Tensor | None) -> None:
    """Raise SessaError unless visible tokens are numbered one after another.

    A constant added to all positions changes nothing, because rotary positions are relative and
    the feedback has none.
    """
    if position_ids is None or position_ids.shape[-1] < 2 or torch.compiler.is_compiling():
        return
    right = position_ids.diff(dim=-1) == 1
    if seen is not None:
        new = seen[:, -position_ids.shape[-1] :]
        right = right | ~(new[:, 1:] & new[:, :-1])
    if not bool(right.all()):
        raise SessaError(
            "position_ids do not rise by 1: several sequences in one row, or gaps, would see each "
            "other; give one sequence a row, padded, with attention_mask"
        )


AutoModelForCausalLM.register(SessaConfig, SessaForCausalLM, exist_ok=True)
