"""The losses against their textbook form."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from littlebit2.train.losses import TopK, distillation_kl, hidden_mse, token_nll, top_k, top_k_kl


def logits(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("shape", [(2, 7, 33), (3, 400, 500)], ids=["one part", "three parts"])
def test_kl_and_its_gradient(rng: torch.Generator, shape: tuple[int, int, int]) -> None:
    student, teacher = logits(rng, *shape), logits(rng, *shape)
    student.requires_grad_()
    loss = distillation_kl(student, teacher)
    (2 * loss).backward()
    again = student.detach().clone().requires_grad_()
    log_s, log_t = (torch.log_softmax(t, -1).flatten(0, 1) for t in (again, teacher))
    expected = functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_kl_in_bfloat16_keeps_its_dtype(rng: torch.Generator) -> None:
    student = logits(rng, 2, 5, 17).bfloat16().requires_grad_()
    loss = distillation_kl(student, logits(rng, 2, 5, 17))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_kl_of_the_same_logits_is_zero(rng: torch.Generator) -> None:
    same = logits(rng, 2, 5, 17)
    assert float(distillation_kl(same, same)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(
        ValueError, match=r"teacher must give logits of shape \[2, 5, 17\].* got \[2, 5, 16\]"
    ):
        distillation_kl(same, same[..., :16])


def test_top_k_kl_is_the_kl_of_merged_outcomes(rng: torch.Generator) -> None:
    student, teacher = logits(rng, 2, 5, 17).requires_grad_(), logits(rng, 2, 5, 17)
    whole = distillation_kl(student, teacher)
    torch.testing.assert_close(top_k_kl(student, top_k(teacher, 17)), whole)
    kept = top_k(teacher, 4)
    loss = top_k_kl(student, kept)
    assert float(loss) < float(whole)
    total = 0.0
    for s, t in zip(student.detach().flatten(0, 1), teacher.flatten(0, 1), strict=True):
        tokens = t.topk(4).indices
        p, q = torch.softmax(t, 0), torch.softmax(s, 0)
        p = torch.cat([p[tokens], 1 - p[tokens].sum(0, keepdim=True)])
        q = torch.cat([q[tokens], 1 - q[tokens].sum(0, keepdim=True)])
        total += float((p * (p / q).log()).sum())
    assert float(loss.detach()) == pytest.approx(total / 10, rel=1e-4)
    loss.backward()
    assert bool(torch.isfinite(student.grad).all())
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary's size 17, got 18"):
        top_k(teacher, 18)


def test_a_certain_teacher_gives_no_nan() -> None:
    student = torch.zeros(1, 1, 4, requires_grad=True)
    certain = TopK(torch.tensor([[[0.0]]]), torch.tensor([[[2]]]))
    loss = top_k_kl(student, certain)
    loss.backward()
    assert float(loss) == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-5)
    assert bool(torch.isfinite(student.grad).all())


def test_hidden_mse(rng: torch.Generator) -> None:
    ours = [torch.randn(2, 3, 8, generator=rng) for _ in range(3)]
    theirs = [torch.randn(2, 3, 8, generator=rng) for _ in range(3)]
    expected = sum(float((a - b).square().mean()) for a, b in zip(ours, theirs, strict=True))
    assert float(hidden_mse(ours, theirs)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"as many hidden states as the student \(3\), got 2"):
        hidden_mse(ours, theirs[:2])


def test_token_nll_shifts(rng: torch.Generator) -> None:
    scores, tokens = logits(rng, 2, 300, 9), torch.randint(0, 9, (2, 300), generator=rng)
    expected = -torch.log_softmax(scores[:, :-1], -1).gather(-1, tokens[:, 1:, None]).sum()
    torch.testing.assert_close(token_nll(scores, tokens), expected)
