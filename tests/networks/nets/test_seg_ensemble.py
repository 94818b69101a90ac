"""Several networks as one."""

from __future__ import annotations

import pytest
import torch

from monai_iunet import SegEnsemble, SegIUNet

OPTIONS = {"spatial_dims": 3, "in_channels": 2, "out_channels": 3, "channels": (8, 16), "couplings": 1}


def test_the_probabilities_are_the_mean_of_those_of_the_members() -> None:
    torch.manual_seed(0)
    members = [SegIUNet(**OPTIONS).eval() for _ in range(3)]
    ensemble = SegEnsemble(3, **OPTIONS).eval()
    ensemble.load_state_dict(SegEnsemble.state_of([member.state_dict() for member in members]))
    images = torch.rand(2, 2, 8, 9, 8)
    with torch.no_grad():
        expected = torch.stack([member(images).softmax(1) for member in members]).mean(0)
        torch.testing.assert_close(ensemble(images).softmax(1), expected)
        scripted = torch.jit.script(ensemble)
        torch.testing.assert_close(scripted(images).softmax(1), expected)


def test_of_deep_supervision_the_finest_logits_count() -> None:
    options = {**OPTIONS, "channels": (8, 16, 16), "deep_supervision": True}
    ensemble = SegEnsemble(2, **options).eval()
    images = torch.rand(1, 2, 8, 8, 8)
    expected = ensemble(images)
    torch.testing.assert_close(ensemble.train()(images), expected)


def test_a_probability_of_zero_is_no_hole() -> None:
    ensemble = SegEnsemble(2, **OPTIONS).eval()
    with torch.no_grad():
        for member, sign in zip(ensemble.members, (1, -1)):
            member.head.weight.zero_()
            member.head.bias.copy_(torch.tensor([1e4, -1e4, 0.0]) * sign)  # float32 has no such small probability
        found = ensemble(torch.rand(1, 2, 8, 8, 8)).softmax(1)
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor([0.5, 0.5, 0.0]))


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out_channels must be 2 or more, background included, .* got 1\."):
        SegEnsemble(2, **{**OPTIONS, "out_channels": 1})


def test_members_of_another_orthogonal_map_are_refused() -> None:
    states = [SegIUNet(**OPTIONS, orthogonal_map="matrix_exp").state_dict() for _ in range(2)]
    together = SegEnsemble.state_of(states)
    SegEnsemble(2, **OPTIONS, orthogonal_map="matrix_exp").load_state_dict(together)
    with pytest.raises(RuntimeError, match=r"members\.0\..* was saved with orthogonal_map='matrix_exp'"):
        SegEnsemble(2, **OPTIONS).load_state_dict(together)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_leaves_the_members_as_they_are() -> None:
    ensemble = SegEnsemble(2, **OPTIONS).eval()
    before = list(ensemble.state_dict())
    torch.jit.script(ensemble)
    assert list(ensemble.state_dict()) == before
    assert all(isinstance(member, SegIUNet) for member in ensemble.members)
