"""Tools around train_gpt.py: `python -m tools.NAME --help` says what each does."""
