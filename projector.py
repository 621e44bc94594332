"""The projector f_φ: embeddings e of the pathology encoder -> tokens c for the U-Net's cross-attention.

    h = σ(LN(W₁ e + b₁)),  h in R^d_h                                                                  (eq. 3)
    c = [W₂ h + b₂] as n_c x d_c,  c in R^(n_c x d_c)                                                  (eq. 4)

σ is SiLU, LN is LayerNorm. The null embedding e_∅ stands in for e before the projection."""
import torch
import torch.nn.functional as F
from torch import nn

SHAPE = ("embedding", "hidden", "tokens", "context", "depth", "token_norm")     # in an adapter's header

class Projector(nn.Module):
    """f_φ: e (B, d_e) -> c (B, n_c, d_c). The defaults are the paper's baseline: 4,724,736 parameters.
    With the null embedding (1, d_e), a parameter of this module, they are 4,726,272, Table 2's number for the
    projector alone. A LayerNorm(d_c) on the tokens, as in IP-Adapter, gives the same number without the null
    embedding: `token_norm` is this other reading. Depth 3, not specified by the paper, repeats eq. (3)."""
    def __init__(self, d_e=1536, d_h=1024, n_c=4, d_c=768, depth=2, token_norm=False):
        super().__init__()
        self.shape = dict(zip(SHAPE, (d_e, d_h, n_c, d_c, depth, int(token_norm))))
        self.linear = nn.ModuleList(nn.Linear(d_e if k == 0 else d_h, d_h) for k in range(depth - 1))
        self.norm = nn.ModuleList(nn.LayerNorm(d_h) for _ in range(depth - 1))
        self.out = nn.Linear(d_h, n_c * d_c)
        self.token_norm = nn.LayerNorm(d_c) if token_norm else nn.Identity()
        self.null = nn.Parameter(0.01 * torch.randn(1, d_e))

    def forward(self, e, keep=None):
        """e (B, d_e) -> c (B, n_c, d_c).
        keep (B, depth-1, d_h): dropout as factors, 0 or 1/(1-p); None outside training."""
        h = e
        for k, (linear, norm) in enumerate(zip(self.linear, self.norm)):
            h = F.silu(norm(linear(h)))                                 # (eq. 3)
            if keep is not None:
                h = h * keep[:, k]
        c = self.out(h).unflatten(-1, (self.shape["tokens"], -1))       # (eq. 4)
        return self.token_norm(c)
