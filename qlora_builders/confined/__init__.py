"""What strangers wrote is evaluated here: chat templates, tokenizers, regexes, YAML.

All of these can take all time or all memory, and no check from inside one process foresees every
way. So they run in a second process with limits on CPU time, memory and output; what becomes too
much ends that process, and is one error in this one.

`process.py` is this side: `ask` and `Kept`. `worker.py` is the other; it calls `chat.py`,
`tokens.py` and `patterns.py`. None needs torch or numpy, and nothing else imports jinja2 or
tokenizers.
"""
