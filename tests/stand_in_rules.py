"""What CUDA refuses and what it lets pass: run by test_stand_in_gpu.py, on a GPU or what stands in for one."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import Linear
from torch.nn.functional import scaled_dot_product_attention

here = torch.randn(4, 4)


def there(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: there(4, 4) + here,
        lambda: here * there(1).sum(),
        lambda: here[torch.zeros(2, dtype=torch.int64, device="cuda")],
        lambda: torch.stack([there(1).sum(), torch.tensor(1.0)]),
        lambda: Linear(4, 4)(there(4, 4)),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda: torch.rand(3, generator=torch.Generator("cuda")),
        lambda: torch._int_mm(there(8, 8).to(torch.int8), there(8, 8).to(torch.int8)),
        lambda: there(4).numpy(),
    ],
)
def test_a_mistake_fails(mistake: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        mistake()


def test_what_cuda_allows_is_computed() -> None:
    x = there(4, 4)
    assert x.device.type == "cuda"
    assert x.is_cuda
    assert torch.equal((x * torch.tensor(2.0)).cpu(), 2 * x.cpu())
    assert torch.equal(x[torch.tensor([1, 0])].cpu(), x.cpu()[[1, 0]])
    assert x.view(2, 8).zero_().cpu().sum() == x.sum().item() == 0
    assert torch.tensor([1.0], device="cuda").tolist() == [1]
    half = there(4, 4).bfloat16()
    assert torch.mm(half, half, out_dtype=torch.float32).dtype == torch.float32


def test_gradients_stay_there() -> None:
    layer = Linear(4, 3).to("cuda")
    q = layer(there(2, 5, 4)).unsqueeze(1)
    scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
