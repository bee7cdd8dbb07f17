"""The Kubernetes operator for FineTuneJob."""
