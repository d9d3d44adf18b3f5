"""The kernel of blocked weights, compiled: right in every dtype, and a row's sum whatever the number of rows."""

import pytest
import torch

from pipeline.backends.inductor.backend import LoadedGraph
from pipeline.backends.inductor.block_linear import block_linear
from pipeline.backends.packing import BlockPacking


class Products(torch.nn.Module):
    """Products of the first rows, and of a slice that does not start at the tensor's beginning."""

    def forward(self, x, weight):
        return (*(block_linear(x[:rows], weight) for rows in (1, 5, 8, 13)), block_linear(x[3:5], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_product_is_exact_and_alike_for_any_number_of_rows(tmp_path, dtype):
    from pipeline.backends.inductor import block_linear_kernel  # noqa: F401 - tells Inductor of the kernel

    torch.manual_seed(0)
    plain = torch.randn(190, 96).to(dtype)
    x, weight = torch.randn(13, 96), BlockPacking().pack(plain, "linear")
    program = torch.export.export(Products(), (x, weight))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "graph.pt2"), inductor_configs={"cpp.threads": 1}
    )
    one, five, eight, all_rows, inner = (t[:, :190] for t in LoadedGraph(package, -1).run([x, weight]))
    exact = x.double() @ plain.double().T
    worst = (all_rows - exact).abs().max()
    assert worst < 5e-5, f"largest error {worst:.1e}"
    for part, same in ((one, all_rows[:1]), (five, all_rows[:5]), (eight, all_rows[:8]), (inner, all_rows[3:5])):
        assert torch.equal(part, same)
    eager = block_linear(x, weight)[:, :190]
    assert torch.allclose(eager.double(), exact, atol=5e-5)
