"""Gated attention over a bag of tiles: one prediction per slide, and how much each tile counted (Ilse et al. 2018, §2.4).

    h_k = dropout(ReLU(W x_k + b))
    a_k = softmax_k( w · (tanh(V h_k + b_V) * sigmoid(U h_k + b_U)) )
    y   = C (sum_k a_k h_k) + c

The order of the tiles does not matter, nor does their number. One bag passes as [n, d]; bags of several sizes pass padded, as
`pad_bags` makes them, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad.files import MadError


class GatedAttention(nn.Module):
    """Attention pooling and a linear output.

    Args:
        dim: length d of a tile's embedding.
        hidden: length of h, and of both sides of the gate.
        outputs: numbers per slide: classes (1 for two of them), or targets of a regression.
        dropout: share of h dropped in training.
    """

    def __init__(self, dim: int, hidden: int, outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.tanh = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)  # a bias would cancel in the softmax
        self.output = nn.Linear(hidden, outputs)

    def forward(self, bag: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A bag [n, d] to its output [outputs] and attention [n]; padded bags [b, n, d] to [b, outputs] and [b, n].

        Args:
            bag: embeddings.
            present: [n] or [b, n] bool, False where a bag is padded. Not given: every tile is one.

        Returns:
            The output and the attention, which sums to 1 over the tiles of each bag and is 0 on padding.

        Raises:
            MadError: a bag without a tile.
        """
        if bag.shape[-2] == 0 or (present is not None and not bool(present.any(-1).all())):
            raise MadError("attention pooling: a bag holds no tile; leave slides without tissue out")
        h = self.dropout(F.relu(self.embed(bag)))
        scores = self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h))).squeeze(-1)
        if present is not None:
            scores = scores.masked_fill(~present, -torch.inf)
        attention = scores.softmax(-1)
        return self.output((attention[..., None, :] @ h).squeeze(-2)), attention


def pad_bags(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags [n_b, d] as one tensor [b, max n, d], zero where padded, and which places are tiles [b, max n] bool."""
    sizes = torch.tensor([len(bag) for bag in bags], device=bags[0].device)
    padded = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
