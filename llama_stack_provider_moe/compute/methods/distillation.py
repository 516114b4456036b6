"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531): a student learns a teacher's probabilities.

Shapes: N tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor


def kl_from_teacher(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each token (N,), in nats, of the logits divided by the temperature; in fp32.

    Args:
        student_NV: logits of the student.
        teacher_NV: logits of the teacher.
        temperature: what both are divided by.
    """
    return _kl(_log_probabilities(teacher_NV, temperature), _log_probabilities(student_NV, temperature))


def divergence_from_teacher(student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float) -> Tensor:
    """Generalized Jensen-Shannon divergence of each token (N,), in nats (arXiv 2306.13649, equation 1); in fp32.

    With m = beta * teacher + (1 - beta) * student it is beta * KL(teacher || m) + (1 - beta) * KL(student || m). The
    ends, where that is 0, are KL(teacher || student) for 0 and KL(student || teacher) for 1, as in TRL.

    Args:
        student_NV: logits of the student.
        teacher_NV: logits of the teacher.
        beta: 0 to 1.
        temperature: what both are divided by.

    >>> equal, sure = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    >>> [round(divergence_from_teacher(equal, sure, beta, 1.0).item(), 4) for beta in (0.0, 0.5, 1.0)]
    [0.1308, 0.0338, 0.1438]
    """
    student_NV, teacher_NV = _log_probabilities(student_NV, temperature), _log_probabilities(teacher_NV, temperature)
    if beta == 0:
        return _kl(teacher_NV, student_NV)
    if beta == 1:
        return _kl(student_NV, teacher_NV)
    mixed_NV = torch.logaddexp(student_NV + math.log1p(-beta), teacher_NV + math.log(beta))
    return beta * _kl(teacher_NV, mixed_NV) + (1 - beta) * _kl(student_NV, mixed_NV)


def entropy_of(logits_NV: Tensor, temperature: float) -> Tensor:
    """Entropy of each token's probabilities (N,), in nats, of the logits divided by the temperature; in fp32."""
    log_p_NV = _log_probabilities(logits_NV, temperature)
    return -(log_p_NV.exp() * log_p_NV).sum(dim=-1)


def _log_probabilities(logits_NV: Tensor, temperature: float) -> Tensor:
    return (logits_NV.float() / temperature).log_softmax(dim=-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) of each token, of log-probabilities."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(dim=-1)


def distilled_log_prob(log_prob: Tensor, kl: Tensor, weight: float, temperature: float) -> Tensor:
    """What takes the place of a token's log-probability: minus (1 - weight) * CE + weight * temperature^2 * KL.

    The gradient of the KL of softened probabilities shrinks with 1 / temperature^2; the factor undoes that (section 2).

    Args:
        log_prob: of each token's label.
        kl: `kl_from_teacher` of each token.
        weight: share of the teacher's term.
        temperature: of that term.
    """
    return (1 - weight) * log_prob - weight * temperature**2 * kl
