import torch


class StateInitializer(torch.nn.Module):
    def __init__(self, shapes, dtypes, local_ranks_size):
        super().__init__()
        self.shapes, self.dtypes, self.local_ranks_size = shapes, dtypes, local_ranks_size

    def forward(self):
        return [
            {
                name: torch.zeros(shape, dtype=self.dtypes[name], device=f"privateuseone:{rank}")
                for name, shape in self.shapes.items()
            }
            for rank in range(self.local_ranks_size)
        ]
