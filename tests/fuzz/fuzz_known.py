"""Cases that are still read wrongly: kind -> what is wrong, and the seeds. Each has to fail."""

from __future__ import annotations

_WRONG: dict[str, tuple[str, str]] = {}
_OLD: dict[str, tuple[str, str]] = {
    "step.full_state": (
        "altered under a manifest that fits it: errors of torch and of Python",
        "0 3 4 6 7 8 10 12 13 14 15 17 19 20 22 24 26 29 30 31 32 33 38 39 40 41 43 44 45 49 "
        "50 51 52 53 57 59 60 61 63 64 65 66 68 69 70 73 74 75 76 77 78 81 82 83 84 86 88 89 "
        "93 94 96 98",
    ),
    "step.info": (
        "a step that is no integer is taken for one; nesting: RecursionError",
        "5 10 22 65 489 580",
    ),
    "step.manifest": (
        "nesting: RecursionError",
        "117 204 888",
    ),
    "step.parts_state": (
        "altered under a manifest that fits it: errors of torch and of Python",
        "0 1 5 6 7 11 12 13 14 16 20 21 23 24 25 26 27 28 29 30 31 32 33 34 36 37 39 41 43 44 "
        "45 46 47 48 49",
    ),
    "step.state": (
        "altered under a manifest that fits it: errors of torch and of Python",
        "2 3 4 5 6 8 12 13 16 17 20 21 23 24 25 27 29 30 31 32 35 36 39 41 42 43 44 45 46 47 "
        "48 49 50 51 52 53 54 56 59 60 61 62 63 64 65 66 67 71 73 74 75 76 77 79 80 81 82 83 "
        "84 85 86 87 88 89 90 91 92 93 95 97 98 100 103 104 105 106 108 109 110 111 112 114 "
        "115 116 117 118 119 120 121 122 123 124 125 126 127 128 130 131 132 133 135 137 139 "
        "140 141 142 143 145",
    ),
    "template.file": (
        "`{% continue %}` and `{% break %}` outside a loop: SyntaxError",
        "24 35 586",
    ),
    "tokenizer.config": (
        "half of a surrogate pair as a special token: TypeError of tokenizers",
        "227 324",
    ),
    "tokenizer.json": (
        "BOS is put behind a text where 'a' has no token; a token that is not there: Exception",
        "452 477",
    ),
    "tokenizer.map": (
        "half of a surrogate pair as a special token: TypeError of tokenizers",
        "94",
    ),
}
KNOWN = {
    (kind, int(seed)): wrong for kind, (wrong, seeds) in _WRONG.items() for seed in seeds.split()
}
