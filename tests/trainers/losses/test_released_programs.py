"""Loss and gradient against what the papers' released programs print on the same predictions."""

import pytest
import torch

from trainers import losses, recipes
from trainers.objectives import Bound

METHODS = {
    "diffusion_dpo": (lambda h: recipes.DiffusionDPO(beta=h["beta_dpo"]), 1e-4),
    "diffusion_sdpo": (lambda h: recipes.SDPO(beta=h["beta_dpo"], mu=h["winner_preserving_mu"]), 1e-4),
    "dspo": (lambda h: recipes.DSPO(beta=h["beta_dpo"]), 1e-4),
    "dmpo": (lambda h: recipes.DMPO(beta=h["beta_dpo"], alpha=h["dmpo_alpha"]), 1e-4),
    # The program's float32 exp(x) - 1 cancels.
    "mapo": (lambda h: recipes.MaPO(beta=h["beta_mapo"], snr=h["snr_value"]), 1e-3),
}


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_equal_the_released_programs(method, released):
    objective_of, tolerance = METHODS[method]
    cases = [c for c in released("objectives.json") if c["method"] == method]
    assert len(cases) == 4
    for case in cases:
        doubled, *rest = case["shape"]
        target, policy, reference = (
            torch.tensor(case[k]).view(2, doubled // 2, *rest) for k in ("target", "policy", "reference")
        )
        policy.requires_grad_()
        bound, batch = Bound(objective_of(case["hyper"])), losses.PairBatch(target, policy, reference)
        loss = bound.loss(batch, bound.sums(batch, {})).mean()
        loss.backward()
        norm = case["grad_norm"]
        assert loss.item() == pytest.approx(case["loss"], rel=tolerance)
        assert policy.grad.norm().item() == pytest.approx(norm, rel=tolerance)
        assert policy.grad.sum().item() == pytest.approx(case["grad_sum"], rel=tolerance)
        assert policy.grad.flatten()[:8].tolist() == pytest.approx(case["grad_first8"], rel=tolerance, abs=1e-6 * norm)


def _adaptive(arguments):
    """Return the objective that is the released Adaptive-DPO program under its own option names; None if there is none."""
    beta, beta_ipo = 2.0 * arguments["beta_dpo"], float(arguments["beta"])
    forms = {"sigmoid": "dpo", "ipo": "ipo"}
    if not arguments["use_self_logit_reweight"]:
        plain = {
            "sigmoid": recipes.DiffusionDPO(beta),
            "ipo": recipes.IPO(beta_ipo),
            "robust": recipes.RDPO(beta, arguments["label_smoothing"]),
            "conservative": recipes.CDPO(beta, arguments["label_smoothing"]),
        }
        return plain.get(arguments["loss_type"])
    return recipes.AdaptiveDPO(
        beta=beta,
        form=forms[arguments["loss_type"]],
        beta_ipo=beta_ipo,
        rho=arguments["logits_rho"],
        normalise=arguments["use_logits_normalization"],
        c1=arguments["rewight_intercept"],
        k1=arguments["rewight_temparature"],
        weighting={"linear": "linear", "quardratic": "quadratic"}[arguments["weight_type"]],
        margin_term=arguments["margin_type"] if arguments["use_margin"] else "none",
    )


def test_adaptive_dpo_equals_the_released_program_in_every_case_but_hinge(released):
    cases = released("adaptive_dpo.json")
    covered = [(c, o) for c in cases if (o := _adaptive(c["args"])) is not None]
    # The hinge loss is no objective of ours.
    assert {c["args"]["loss_type"] for c in cases if _adaptive(c["args"]) is None} == {"hinge"}
    assert len(covered) == 44
    for case, objective in covered:
        errors = {k: torch.tensor([case[f"{k}_w"], case[f"{k}_l"]]) for k in ("policy", "ref", "ema_slow", "ema_fast")}
        predictions = {k: v.double().sqrt()[:, :, None, None, None] for k, v in errors.items()}
        policy = predictions["policy"].requires_grad_()
        batch = losses.PairBatch(
            torch.zeros_like(policy),
            policy,
            predictions["ref"],
            annotator_errors=torch.stack([errors["ema_slow"], errors["ema_fast"]]).double(),
        )
        bound = Bound(objective)
        state = bound.state()
        state = {**state, "steps": torch.tensor(100.0)} if state else {}
        statistics = {**state, **bound.sums(batch, state)}
        loss = bound.loss(batch, statistics).mean()
        loss.backward()
        # s falls with the winner's error, p^2: d loss / d s = -(d loss / d p) / (2 p).
        by_margin = -(policy.grad / (2 * policy))[0].flatten()
        largest = max(abs(g) for g in case["dloss_dlogits"])
        assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
        assert by_margin.tolist() == pytest.approx(case["dloss_dlogits"], rel=1e-4, abs=1e-6 * largest)
        details = bound.details(batch, statistics)
        for ours, theirs in (("metric", "weight"), ("weight", "batch_weight"), ("stability", "train_std")):
            assert (theirs in case) == (ours in details)
            if ours in details:
                # The program's float32 sigmoid(z) - 1 loses digits of a small u.
                assert details[ours].tolist() == pytest.approx(case[theirs], rel=1e-4, abs=2e-6)
