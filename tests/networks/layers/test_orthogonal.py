from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from monai_iunet.networks.layers.orthogonal import ORTHOGONAL_MAPS, OrthogonalMatrix
from monai_iunet.networks.nets.iunet import IUNet

MAPS = sorted(ORTHOGONAL_MAPS)


@torch.no_grad()
def defect(matrix: torch.Tensor) -> float:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return float((matrix.mT @ matrix - identity).abs().max())


@pytest.mark.parametrize("name", MAPS)
def test_zero_maps_to_the_identity_and_any_weight_to_a_rotation(name: str) -> None:
    for size in (1, 2, 5, 8):
        matrix = OrthogonalMatrix(size, count=3, orthogonal_map=name).double()
        torch.testing.assert_close(matrix(), torch.eye(size, dtype=torch.double).expand(3, -1, -1), atol=1e-12, rtol=0)
        torch.nn.init.normal_(matrix.weight, std=3)
        rotation = matrix()
        assert defect(rotation) < 1e-12
        torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3, dtype=torch.double))


@pytest.mark.parametrize("name", MAPS)
def test_float32_is_orthogonal_to_its_last_digit_whatever_the_size(name: str) -> None:
    matrix = OrthogonalMatrix(256, base=torch.linalg.qr(torch.randn(256, 256)).Q, orthogonal_map=name)
    torch.nn.init.normal_(matrix.weight, std=1)
    assert matrix().dtype == torch.float32
    assert defect(matrix().double()) < 2e-7
    matrix.bfloat16()
    assert matrix().dtype == torch.float32
    assert defect(matrix().double()) < 2e-7


@pytest.mark.parametrize("name", MAPS)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    base = torch.linalg.qr(torch.randn(4, 4)).Q
    matrix = OrthogonalMatrix(4, count=2, base=base, orthogonal_map=name).double()
    for std in (0.0, 0.1, 2.0):
        weight = (std * torch.randn(2, 4, 4, dtype=torch.double)).requires_grad_()
        compute = lambda w: torch.func.functional_call(matrix, {"weight": w}, ())  # noqa: E731
        assert torch.autograd.gradcheck(compute, (weight,), check_forward_ad=name == "cayley")
        assert torch.autograd.gradgradcheck(compute, (weight,))


@pytest.mark.parametrize("name", MAPS)
def test_stays_orthogonal_under_adamw(name: str) -> None:
    matrix = OrthogonalMatrix(8, count=4, orthogonal_map=name)
    optimizer = torch.optim.AdamW(matrix.parameters(), lr=0.1, weight_decay=0.1)
    target = torch.linalg.qr(torch.randn(4, 8, 8)).Q
    start = (matrix() - target).square().sum().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = (matrix() - target).square().sum()
        loss.backward()
        optimizer.step()
        assert defect(matrix().detach()) < 1e-5
    assert loss.item() < 0.7 * start  # it does learn


def test_reaches_a_matrix_with_eigenvalue_minus_one_through_its_base() -> None:
    haar = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    torch.testing.assert_close(OrthogonalMatrix(2, base=haar)(), haar)


def test_not_learnable_is_constant() -> None:
    matrix = OrthogonalMatrix(3, learnable=False)
    assert not matrix().requires_grad


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_orthogonal_after_a_cast_to_low_precision_and_under_autocast(low: torch.dtype) -> None:
    matrix = OrthogonalMatrix(8, count=2, base=torch.linalg.qr(torch.randn(2, 8, 8)).Q)
    torch.nn.init.normal_(matrix.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = matrix()
    assert under_autocast.dtype == torch.float32
    assert defect(under_autocast) < 1e-5
    assert defect(matrix.to(low)()) < 1e-5
    assert defect(matrix.double()()) < 1e-9


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="orthogonal_map must be one of"):
        OrthogonalMatrix(2, orthogonal_map="euler")
    with pytest.raises(ValueError, match="must be orthogonal"):
        OrthogonalMatrix(2, base=torch.ones(2, 2))
    with pytest.raises(ValueError, match="must have the shape"):
        OrthogonalMatrix(2, base=torch.eye(3))


def test_in_evaluation_the_matrix_is_computed_once_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = OrthogonalMatrix(4, base=torch.linalg.qr(torch.randn(4, 4)).Q)
    counts = []
    compute = OrthogonalMatrix._compute
    monkeypatch.setattr(OrthogonalMatrix, "_compute", lambda *arguments: counts.append(1) or compute(*arguments))

    def check(tolerance: float = 1e-6) -> None:
        with torch.no_grad():
            torch.testing.assert_close(matrix(), compute(matrix, matrix.weight, matrix.base), atol=tolerance, rtol=0)

    matrix.eval()
    for _ in range(3):
        check()
    assert len(counts) == 1
    with torch.no_grad():
        matrix.weight.normal_()  # in place, as optimizers do
    check()
    matrix.weight.data.normal_()  # without a trace, as averages of weights do
    check()
    matrix.base.data.copy_(torch.linalg.qr(torch.randn(4, 4)).Q)
    check()
    torch.nn.utils.vector_to_parameters(torch.randn(16), matrix.parameters())
    check()
    matrix.weight = torch.nn.Parameter(torch.randn(4, 4))
    check()
    matrix.load_state_dict({**matrix.state_dict(), "weight": torch.randn(4, 4)})
    check()
    matrix.load_state_dict({**matrix.state_dict(), "weight": torch.randn(4, 4)}, assign=True)
    check()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        matrix.to(dtype)
        check()
        assert defect(matrix()) < 1e-5
    matrix.train()
    torch.nn.init.normal_(matrix.weight)
    check()
    torch.nn.init.normal_(matrix.eval().weight)
    matrix.eval()
    with torch.inference_mode():
        matrix()
    assert matrix().requires_grad  # with gradients, evaluation is differentiable as ever
    matrix().sum().backward()
    assert sorted(matrix.state_dict()) == ["base", "weight"]
    for mode in (True, False):
        assert [name for name, _ in matrix.train(mode).named_buffers()] == ["base"]


@pytest.mark.parametrize("saved", MAPS)
@pytest.mark.parametrize("built", MAPS)
def test_weights_of_another_map_are_refused_in_one_line(saved: str, built: str, tmp_path: Path) -> None:
    source, target = (IUNet(2, channels=[4, 8], couplings=1, orthogonal_map=name) for name in (saved, built))
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(torch.randn_like(weight))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items() if "matrix" in name}
    if saved == built:
        target.load_state_dict(state)
        image = torch.rand(1, 4, 8, 8)
        torch.testing.assert_close(target(image), source(image))
        return
    with pytest.raises(
        RuntimeError, match=f"was saved with orthogonal_map='{saved}', this network has '{built}'"
    ) as told:
        target.load_state_dict(state, strict=False)
    assert str(told.value).count("orthogonal_map") == 1
    for name, tensor in before.items():
        torch.testing.assert_close(target.state_dict()[name], tensor, rtol=0, atol=0)


def test_tensors_without_a_version_are_loaded_as_before() -> None:
    source, target = OrthogonalMatrix(4), OrthogonalMatrix(4, orthogonal_map="matrix_exp")
    weight = torch.randn(4, 4)
    target.load_state_dict({"weight": weight})
    source.load_state_dict({"weight": weight})
    assert (target() - source()).abs().max() > 0.1


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_entry_of_the_weight_turns_the_matrix(name: str, size: int) -> None:
    matrix = OrthogonalMatrix(size, orthogonal_map=name).double()
    with torch.no_grad():
        matrix.weight.copy_(0.3 * torch.randn(size, size))
    (matrix() * torch.randn(size, size)).sum().backward()
    off_diagonal = ~torch.eye(size, dtype=torch.bool)
    assert (matrix.weight.grad[off_diagonal].abs() > 1e-6).all()
    assert (matrix.weight.grad.diagonal() == 0).all()


def test_a_base_that_is_almost_orthogonal_is_refused() -> None:
    base = torch.eye(3)
    base[0, 1] = 1e-3
    with pytest.raises(ValueError, match="orthogonal, but"):
        OrthogonalMatrix(3, base=base)
    base[0, 1] = 1e-6
    OrthogonalMatrix(3, base=base)


def test_the_base_is_copied() -> None:
    base = torch.eye(3)
    matrix = OrthogonalMatrix(3, base=base)
    base.zero_()
    torch.testing.assert_close(matrix(), torch.eye(3))


def test_evaluation_outlives_a_cast_a_copy_and_a_file(tmp_path: Path) -> None:
    matrix = OrthogonalMatrix(3, base=torch.linalg.qr(torch.randn(3, 3)).Q).eval().double()
    assert not matrix.training
    torch.nn.init.normal_(matrix.weight)
    with torch.no_grad():
        assert matrix().dtype == torch.double
        torch.save(matrix, tmp_path / "matrix.pt")
        for again in (copy.deepcopy(matrix), torch.load(tmp_path / "matrix.pt", weights_only=False)):
            torch.testing.assert_close(again(), matrix())
            torch.nn.init.normal_(again.weight)
            assert not torch.allclose(again(), matrix())


def test_weights_made_in_inference_mode_are_looked_at_each_time() -> None:
    with torch.inference_mode():
        matrix = OrthogonalMatrix(3).eval()
        matrix.weight.add_(0.5 * torch.randn(3, 3))
        first = matrix()
        assert defect(first) < 1e-5
        matrix.weight.mul_(0)
        torch.testing.assert_close(matrix(), torch.eye(3))


def test_a_constant_made_in_inference_mode_serves_training_too() -> None:
    matrix = OrthogonalMatrix(3, learnable=False).eval()
    with torch.inference_mode():
        matrix()
    x = torch.randn(2, 3, requires_grad=True)
    (x @ matrix()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_built_in_a_default_type_of_16_bits(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        matrix = OrthogonalMatrix(2, base=torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double) / 2**0.5)
    finally:
        torch.set_default_dtype(before)
    assert matrix.weight.dtype == matrix.base.dtype == dtype
    assert defect(matrix().detach()) < 1e-5


@pytest.mark.parametrize("base", [None, torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
def test_built_without_values_it_gets_them_by_reset_parameters(base: torch.Tensor | None) -> None:
    with torch.device("meta"):
        matrix = OrthogonalMatrix(2, base=base)
    assert all(tensor.is_meta for tensor in matrix.state_dict().values())
    matrix.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(matrix(), torch.eye(2) if base is None else base)


def test_a_base_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="must have values"):
        OrthogonalMatrix(2, base=torch.eye(2, device="meta"))


def test_a_constant_matrix_lets_gradients_through_in_evaluation() -> None:
    matrix = OrthogonalMatrix(3, learnable=False).eval()
    x = torch.randn(2, 3, requires_grad=True)
    (x @ matrix()).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 3))
