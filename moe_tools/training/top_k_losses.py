"""Language loss and distillation from a teacher of whom only the most likely tokens are kept.

Of each token the teacher's k largest probabilities q_i, i in S, are known, and q_R = 1 - sum_S q_i,
what all the others have together. With p of the model, and p_R = 1 - sum_S p_i:

    KL_k = sum_S q_i log(q_i / p_i) + q_R log(q_R / p_R)

That is the KL of both after all other tokens are made one: at most the exact KL(q || p), by the
log-sum inequality, and equal to it where k is the vocabulary. Its gradient with respect to a logit
is p_i - q_i in S, and p_i (1 - q_R / p_R) outside. As in `logit_losses`, it is made in the forward
pass, in chunks of rows.

Letters: T tokens, V vocabulary, K tokens that are kept, L = K + 1: they and the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_tools.names import IGNORE
from moe_tools.training.logit_losses import ROWS, TINY, LogitLosses, WithGradient, label_rows


def keep_top(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns ids_TK of the k largest logits, and logp_TL: their log-probabilities and the rest's.

    The rest's is -inf where k is the vocabulary. Both in chunks, in fp32.
    """
    chunks = [_keep_top(rows_TV.float(), k) for rows_TV in logits_TV.split(ROWS)]
    ids, logp = zip(*chunks, strict=True)
    return torch.cat(ids), torch.cat(logp)


def _keep_top(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top_TK, ids_TK = logits_TV.topk(k, dim=-1)
    others_TV = logits_TV.scatter(-1, ids_TK, -torch.inf)
    known_TL = torch.cat([top_TK, others_TV.logsumexp(-1, keepdim=True)], -1)
    return ids_TK, known_TL.log_softmax(-1)


def top_k_losses(
    logits_TV: Tensor,
    labels_T: Tensor,
    ids_TK: Tensor,
    logp_TL: Tensor,
    *,
    lm_weight: float,
    distill_weight: float,
) -> tuple[Tensor, LogitLosses]:
    """Returns lm_weight * lm + distill_weight * KL_k, differentiable, and both parts detached.

    Labels of `IGNORE` count in neither; both are NaN where no token is labelled.

    Args:
        logits_TV: of the model.
        labels_T: the tokens that follow.
        ids_TK: the teacher's most likely tokens.
        logp_TL: the log-probabilities of these, and of all others together; rounded ones are made
            to sum to 1 again.
        lm_weight: of the cross entropy.
        distill_weight: of KL_k.
    """
    arguments = (logits_TV, labels_T, ids_TK, logp_TL, lm_weight, distill_weight)
    total, lm, distill = _Fused.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, LogitLosses(lm, distill)


class _Fused(WithGradient):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        ids_TK: Tensor,
        logp_TL: Tensor,
        lm_weight: float,
        distill_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_TV = torch.empty_like(logits_TV)
        lm = logits_TV.new_zeros((), dtype=torch.float32)
        distill = torch.zeros_like(lm)
        count = (labels_T != IGNORE).sum()
        for start in range(0, len(logits_TV), ROWS):
            rows = slice(start, start + ROWS)
            chunk = label_rows(logits_TV, labels_T, rows)
            kept, picked, p_TV, picked_p = chunk
            lm += chunk.nats()
            ids = ids_TK[rows].long()
            q_TL = logp_TL[rows].float().softmax(-1)
            top_TK = p_TV.gather(1, ids)
            rest_T1 = p_TV.scatter(1, ids, 0.0).sum(-1, keepdim=True)  # 1 - sum would cancel
            p_TL = torch.cat([top_TK, rest_T1], -1)
            ratio = q_TL.clamp_min(TINY).log().sub_(p_TL.clamp_min(TINY).log())
            distill += ((q_TL * ratio).sum(-1) * kept).sum()
            share_T1 = distill_weight * q_TL[:, -1:] / rest_T1.clamp_min(TINY)
            grad = p_TV.mul_(lm_weight + distill_weight - share_T1)
            grad.scatter_add_(1, ids, share_T1 * top_TK - distill_weight * q_TL[:, :-1])
            grad.scatter_add_(1, picked, torch.full_like(picked_p, -lm_weight))
            grad_TV[rows] = grad.mul_(kept[:, None] / count)
        lm, distill = lm / count, distill / count
        ctx.save_for_backward(grad_TV)
        total = lm_weight * lm + distill_weight * distill
        ctx.mark_non_differentiable(lm, distill)
        return total, lm, distill
