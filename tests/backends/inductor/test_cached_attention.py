"""The attention kernel, compiled: right in every dtype and for ragged rows, and it reads nothing that no query sees."""

import pytest
import torch

from pipeline.backends.inductor.cached_attention import cached_attention
from pipeline.models.parallel import PLAIN, attend_up_to
from support.compiled import compiled

pytestmark = pytest.mark.compile

KV = 150


class Attention(torch.nn.Module):
    """Over a cache that is written first, as graphs do."""

    def forward(self, q, k, v, new, last):
        k.index_put_((torch.arange(2)[:, None, None], torch.arange(2)[:, None], last[:, None, -1:].long()), new)
        return cached_attention(q, k, v, last, KV)


@pytest.mark.parametrize(
    ("dtype", "dim", "isa"),
    [
        (torch.float32, 64, "native"),
        (torch.float32, 23, "native"),
        (torch.bfloat16, 64, "native"),
        (torch.bfloat16, 64, "avx2"),
        (torch.bfloat16, 24, "avx2"),
        (torch.float16, 64, "native"),
        (torch.float16, 24, "native"),
    ],
)
def test_compiled_attention_is_exact_and_reads_only_what_is_seen(tmp_path, dtype, dim, isa):
    torch.manual_seed(0)
    q, new = torch.randn(2, 6, 3, dim) * 2, torch.randn(2, 2, 1, dim).to(dtype)
    k, v = (torch.randn(3, 2, 160, dim).to(dtype) for _ in range(2))
    last = torch.tensor([[0, 1, 2], [130, 131, 149]], dtype=torch.int32)
    expected = cached_attention(q, write(k, last, new), v, last, KV)
    plain = PLAIN.attend(q, write(k, last, new).float(), v.float(), attend_up_to(last, KV)).view(2, 3, 6, dim)
    rounding = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert torch.allclose(expected.float(), plain, atol=1e-5, rtol=rounding)
    k[0, :, 3:] = torch.nan
    v[0, :, 3:] = torch.nan
    found = compiled(Attention(), (q, k.clone(), v, new, last), tmp_path, isa).run([q, k, v, new, last])[0]
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected.float(), atol=2e-6, rtol=rounding)
    assert dtype == torch.float32 or (found == expected).float().mean() > 0.99
    assert torch.equal(k[1, :, 149], new[1, :, 0])


def write(k, last, new):
    k = k.clone()
    for row in range(2):
        k[row, :, int(last[row, -1])] = new[row, :, 0]
    return k
