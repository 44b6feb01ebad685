"""Attention over tokens: the one place where a kernel is chosen."""

# B batch, L query tokens, S key tokens, N heads, K head dim

from torch import Tensor
from torch.nn import functional


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v without a mask: [B, L, N, K] in the inputs' dtype."""
    out_BNLK = functional.scaled_dot_product_attention(
        q_BLNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2)
    )
    return out_BNLK.transpose(1, 2)
