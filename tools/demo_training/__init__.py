"""The demo model's training: tasks and text, tokenizer, towers that train fast, the loop, the checkpoint."""
