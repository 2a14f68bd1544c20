"""A plan with every kind of adapter and base, for the tests of merging."""

QLORA = [
    {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.1.**", "kind": "qlora", "rank": 3, "alpha": 5, "use_rslora": True},
    {"match": "layers.*.mlp.up_proj", "kind": "frozen_nf4"},
    {"match": "layers.0.self_attn.k_proj", "kind": "lora", "rank": 2, "alpha": 2},
]
