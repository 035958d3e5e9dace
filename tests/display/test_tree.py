from torch import nn

from insitu.display.tree import render, summarise


def test_like_neighbours_are_one_line() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)])
    blocks.append(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    module = nn.ModuleDict({"embed": nn.Embedding(5, 2), "blocks": blocks})
    assert render(summarise("model", module)).splitlines() == [
        "model: ModuleDict",
        "├── embed: Embedding(5, 2)",
        "└── blocks: ModuleList",
        "    ├── [0-2]: Sequential",
        "    │   ├── [0]: Linear(in_features=2, out_features=2, bias=True)",
        "    │   └── [1]: ReLU",
        "    └── [3]: Sequential",
        "        ├── [0]: Linear(in_features=2, out_features=3, bias=True)",
        "        └── [1]: ReLU",
    ]
