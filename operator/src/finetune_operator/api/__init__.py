"""The FineTuneJob API: pydantic models, which are the one source of the CRD, its prose and the API reference."""
