"""What trains a model on one process or on many: processes, weights and their shards."""
