"""The formulas of mixing, against numbers worked out by hand."""

import pytest
import torch

from llama_stack_provider_moe.compute.methods.mixing import domain_rows, mean_of_branches, rows_of_branches


def test_a_mean_by_hand() -> None:
    base, a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 6.0])
    assert mean_of_branches(base, [a, b], [1, 3]).tolist() == [1.25, 5.0]
    assert mean_of_branches(base, [a, b], [0, 2]).tolist() == b.tolist()
    assert torch.equal(mean_of_branches(base, [base, base, base], [1, 2, 3]), base)


def test_a_mean_of_half_precision_is_made_in_full_precision() -> None:
    base = torch.tensor([256.0], dtype=torch.bfloat16)
    moved = torch.tensor([258.0], dtype=torch.bfloat16)
    assert mean_of_branches(base, [base, moved], [1, 1]).tolist() == [257.0], "bf16 has no 257"


def test_rows_of_domains_by_hand() -> None:
    """Two domains: their means are 3 along the first axis, and apart along the second."""
    rows_NH = domain_rows(torch.tensor([[3.0, 1.0], [3.0, -1.0]]), 0.5)
    assert torch.allclose(rows_NH, torch.tensor([[0.0, 0.5], [0.0, -0.5]]))


@pytest.mark.parametrize("domains", [2, 3, 5, 8])
def test_the_mean_token_of_each_domain_goes_to_its_expert(domains: int) -> None:
    """Also where domains lie much closer together than to 0, and unequally far from their centre."""
    generator = torch.Generator().manual_seed(domains)
    common_H = 10 * torch.randn(32, generator=generator)
    away_NH = torch.randn(domains, 32, generator=generator) * torch.linspace(0.1, 2, domains)[:, None]
    means_NH = common_H + away_NH
    rows_NH = domain_rows(means_NH, 0.7)
    assert (means_NH @ rows_NH.T).argmax(dim=1).tolist() == list(range(domains))
    assert torch.allclose(rows_NH.norm(dim=1), torch.full((domains,), 0.7))
    assert (rows_NH @ means_NH.mean(dim=0)).abs().max() < 1e-4, "what all share decides nothing"


def test_equal_domains_are_refused() -> None:
    with pytest.raises(ValueError, match="domain 0 has the mean router input of all domains"):
        domain_rows(torch.ones(2, 4), 1.0)


def test_odds_against_the_anchor_are_those_of_the_branch() -> None:
    generator = torch.Generator().manual_seed(1)
    routers_N2H = torch.randn(3, 2, 8, generator=generator)
    token_H = torch.randn(8, generator=generator)
    rows_EH = rows_of_branches(routers_N2H)
    assert rows_EH.shape == (4, 8)
    for at, router_2H in enumerate(routers_N2H):
        ours = torch.softmax((rows_EH @ token_H)[[0, at + 1]], dim=0)
        assert torch.allclose(ours, torch.softmax(router_2H @ token_H, dim=0), atol=1e-6)
    assert torch.allclose(rows_of_branches(routers_N2H[:1]), routers_N2H[0], atol=1e-6), "one branch: its own router"
