"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531): a student learns a teacher's probabilities.

Shapes: N tokens, V vocabulary.
"""

from torch import Tensor


def kl_from_teacher(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each token (N,), in nats, of the logits divided by the temperature; in fp32.

    Args:
        student_NV: logits of the student.
        teacher_NV: logits of the teacher.
        temperature: what both are divided by.
    """
    student_NV = (student_NV.float() / temperature).log_softmax(dim=-1)
    teacher_NV = (teacher_NV.float() / temperature).log_softmax(dim=-1)
    found: Tensor = (teacher_NV.exp() * (teacher_NV - student_NV)).sum(dim=-1)
    return found


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
