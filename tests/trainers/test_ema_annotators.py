import torch
from diffusers.training_utils import EMAModel

from trainers.ema_annotators import DECAYS, EmaAnnotators, decay_after


def test_annotators_follow_the_policy_as_diffusers_ema_models_do():
    torch.manual_seed(0)
    policy = torch.nn.Linear(3, 3).double()
    ours = EmaAnnotators(policy)
    theirs = [EMAModel(policy.parameters(), decay=d) for d in DECAYS]
    for step in range(1, 40):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += torch.randn_like(parameter)
        ours.after_step(step, policy)
        for model in theirs:
            model.step(policy.parameters())
    for mine, model in zip(ours.models, theirs, strict=True):
        for a, b in zip(mine.state_dict().values(), model.shadow_params, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_the_decay_starts_as_a_copy_and_grows_to_its_limit():
    assert [decay_after(n, 0.9999) for n in (0, 1, 8)] == [0.0, 2 / 11, 0.5]
    assert decay_after(10**6, 0.9999) == 0.9999
    assert decay_after(20, 0.5) == 0.5


def test_annotators_are_restored_from_their_state():
    policy = torch.nn.Linear(2, 2)
    annotators = EmaAnnotators(policy)
    with torch.no_grad():
        policy.weight += 1
    annotators.after_step(15, policy)
    other = EmaAnnotators(torch.nn.Linear(2, 2))
    other.load_state_dict(annotators.state_dict())
    x = torch.ones(1, 2)
    for a, b in zip(annotators.models, other.models, strict=True):
        assert torch.equal(a(x), b(x))
    # At 14 earlier updates the slow one's decay is 15/24, the fast one's 0.5.
    assert not torch.equal(*(m(x) for m in annotators.models))
