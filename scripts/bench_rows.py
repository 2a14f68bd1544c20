"""What rendering and tokenizing rows costs: `python scripts/bench_rows.py --rows 10000`.

Prints JSON: seconds of `build_dataset`, once for each kind of rows, with the demo's tokenizer.
Conversations
have three turns and a template with headers, a date and an end-of-turn token. To compare two
versions, alternate them under PYTHONPATH and take medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from qlora_builders.config.shipped import demo_path
from qlora_builders.data import Tokenizer, build_dataset

TEMPLATE = (
    "{{- bos_token }}{%- set today = strftime_now('%d %b %Y') %}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' ~ today ~ '\n\n' }}"
    "{{- system + '<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QUESTION = "How many of them are there, and where did you see the last one of these? "
ANSWER = "There are twelve of them in all; the last one was seen beside the harbour at noon. "


def write_rows(folder: Path, rows: int) -> dict[str, Path]:
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER * 3}]
    kinds = {
        "chat": {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        "instruct": {"prompt": QUESTION, "completion": ANSWER * 3},
    }
    files = {}
    for kind, row in kinds.items():
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text((json.dumps(row) + "\n") * rows)
    return files


def write_tokenizer(folder: Path, template: str | None) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(Path(demo_path("base") / name).read_bytes())
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"chat_template": template}
    file.write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    arguments = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, file in write_rows(folder, arguments.rows).items():
            template = TEMPLATE if kind == "chat" else None
            tokenizer = Tokenizer.from_dir(write_tokenizer(folder / kind, template))
            started = time.perf_counter()
            build_dataset(file, tokenizer, format=kind, max_seq_len=512)
            seconds[kind] = round(time.perf_counter() - started, 3)
    print(json.dumps({"rows": arguments.rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
