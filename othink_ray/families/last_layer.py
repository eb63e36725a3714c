"""The last text layer goes on only where an answer token is predicted; of all other tokens it makes keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Narrow:
    """Before a layer of any of the text models here, which are alike but for their attention."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, asked: Tensor | None = None, **settings: Any) -> Tensor:
        """(1, N, H), and the K places asked for -> (1, K, H); all N where nothing is said of them, as in sampling."""
        if asked is None:
            whole: Tensor = super().forward(hidden_states, **settings)  # type: ignore[misc]
            return whole
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), in_last_layer=True, **settings)
        kept = hidden_states.index_select(1, asked) + attended.index_select(1, asked)
        read: Tensor = kept + self.mlp(self.post_attention_layernorm(kept))
        return read


def narrow(layer: nn.Module) -> None:
    """Make it go on only where it is asked to."""
    plain = type(layer)
    layer.__class__ = type(f"Narrow{plain.__name__}", (_Narrow, plain), {})


def is_narrow(layer: nn.Module) -> bool:
    return isinstance(layer, _Narrow)
