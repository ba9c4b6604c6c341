"""One module a command: `run(config, free_text)`, no logic of its own."""
