"""Conversations: trees of messages, kept as they grow; knows no model, no template and no terminal."""
