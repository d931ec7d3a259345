"""The KV state of conversations on disk: kept as it comes to be, put back when a prompt begins in the same way."""
