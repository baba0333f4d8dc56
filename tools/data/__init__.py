"""Makes the data that train_gpt.py reads: token shards and their tokenizer."""
