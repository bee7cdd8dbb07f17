"""From a checkpoint to a model under the digest of its content. Only `promote` needs torch."""
